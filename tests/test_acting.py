"""Decisions with networks that cannot be folded: compiled ones give what the plain sampler gives."""

import numpy as np
import pytest

from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.networks.eta import EtaFixed
from diffusion_rl.networks.unet1d import Unet1D
from diffusion_rl.networks.vision import VisionDiffusionMLP
from diffusion_rl.networks.vision_unet1d import VisionUnet1D
from diffusion_rl.networks.vit import VitEncoder
from diffusion_rl.policies.acting import DiffusionActor
from diffusion_rl.policies.diffusion import FineTunedDiffusionPolicy

A, H, OBS, TO, K = 2, 4, 3, 2, 5
SAME = 1e-10


def eyes():
    cfg = {"embed_dim": 8, "num_heads": 2}
    return {"backbone": VitEncoder(cfg=cfg, img_h=16, img_w=24), "spatial_emb": 5, "cond_dim": OBS * TO}


UNET = {"dim": 4, "dim_mults": [1, 2], "kernel_size": 3, "n_groups": 2, "cond_predict_scale": True}
NETWORKS = {
    "unet": lambda: Unet1D(A, OBS * TO, 4, **UNET),
    "vision mlp": lambda: VisionDiffusionMLP(action_dim=A, horizon_steps=H, mlp_dims=[8], **eyes()),
    "vision unet": lambda: VisionUnet1D(action_dim=A, **UNET, **eyes()),
}


def make_policy(name, dtype="float64", **kwargs):
    with precision(dtype), initial_weights(NoiseSource(1)):
        policy = FineTunedDiffusionPolicy(
            NETWORKS[name](), horizon_steps=H, obs_dim=OBS, action_dim=A, denoising_steps=K, eta=EtaFixed(), **kwargs
        )
        with initial_weights(NoiseSource(2)):
            policy.actor_ft = NETWORKS[name]()
        return policy


def observation(name, n_envs):
    draw = NoiseSource(3)
    state = draw.normal((n_envs, TO, OBS), np.float64)
    rgb = draw.integers(0, 256, (n_envs, TO, 3, 16, 24)).astype(np.uint8) if "vision" in name else None
    return state, rgb


DDPM, DDIM = {"ft_denoising_steps": 2}, {"ft_denoising_steps": 3, "use_ddim": True}


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (DDPM, "vision mlp"),
        (DDIM, "vision mlp"),
        *(pytest.param(s, name, marks=pytest.mark.slow) for s in (DDPM, DDIM) for name in ("unet", "vision unet")),
    ],
    ids=str,
)
def test_compiled_networks_give_the_plain_samples(name, sampling):
    """16 environments in parts; explored chains, their log-probabilities, and evaluation."""
    steps = {"ddim_steps": 3} if sampling.get("use_ddim") else {}
    policy = make_policy(name, **sampling, **steps)
    state, rgb = observation(name, 16)
    actors = [DiffusionActor(policy, fast) for fast in (True, False)]
    assert not actors[0].folds
    noise = NoiseSource(4).normal(actors[0].noise_shape(16), np.float64)
    for deterministic in (False, True):
        one, other = (actor.act(state, noise, deterministic, rgb) for actor in actors)
        for mine, plain in zip(one, other, strict=True):
            np.testing.assert_allclose(mine, plain, rtol=0, atol=SAME)
    cond = {"state": state} | ({} if rgb is None else {"rgb": rgb})
    again, _ = policy.log_probs(cond, one.chains)
    assert again.shape == (16 * policy.ft_denoising_steps, H, A)


@pytest.mark.slow
def test_compiled_networks_follow_their_weights():
    """Weights are read at every decision, not when the program is made; a U-Net gives its plain samples."""
    policy = make_policy("unet", ft_denoising_steps=2)
    actor, (state, _) = DiffusionActor(policy), observation("unet", 8)
    noise = NoiseSource(4).normal(actor.noise_shape(8), np.float64)
    before = actor.act(state, noise, deterministic=True).actions
    plain = DiffusionActor(policy, fast=False).act(state, noise, deterministic=True).actions
    np.testing.assert_allclose(before, plain, rtol=0, atol=SAME)
    bias = policy.actor_ft.final_conv[-1].bias
    bias.assign(bias + 1)
    actor.weights_changed()
    assert np.abs(actor.act(state, noise, deterministic=True).actions - before).max() > 1e-3


@pytest.mark.parametrize("tuned", [2, 3, K], ids="{} fine-tuned".format)
def test_many_steps_are_several_programs(tuned, monkeypatch):
    """They give what one program gives: decisions, chains and log-probabilities."""
    from diffusion_rl.networks.mlp import DiffusionMLP

    sizes = {"action_dim": A, "horizon_steps": H, "cond_dim": OBS * TO, "mlp_dims": [8] * 3, "residual_style": True}
    monkeypatch.setitem(NETWORKS, "mlp", lambda: DiffusionMLP(**sizes))
    n_envs = 3 if tuned == 2 else 24  # these are dealt to the cores, where there are several
    policy, (state, _) = make_policy("mlp", ft_denoising_steps=tuned), observation("mlp", n_envs)
    whole = DiffusionActor(policy)
    monkeypatch.setattr("diffusion_rl.policies.acting.MOST_UNROLLED", 2)
    cut, plain = DiffusionActor(policy), DiffusionActor(policy, fast=False)
    assert whole.folds
    noise = NoiseSource(4).normal(whole.noise_shape(n_envs), np.float64)
    for deterministic in (False, True):
        one, several, slow = (actor.act(state, noise, deterministic) for actor in (whole, cut, plain))
        for name, array in one.arrays().items():
            assert several.arrays()[name].shape == array.shape == slow.arrays()[name].shape
            np.testing.assert_allclose(several.arrays()[name], array, rtol=0, atol=SAME)
            np.testing.assert_allclose(several.arrays()[name], slow.arrays()[name], rtol=0, atol=SAME)


def test_a_gpu_keeps_a_batch_whole(monkeypatch):
    """Cores get a part each; a GPU, on which parts would wait for one another, gets one."""
    from diffusion_rl.core import batching

    monkeypatch.setattr(batching, "cores", lambda: 4)
    assert [s.start for s in batching.parts(40, 10)] == [0, 10, 20, 30]
    monkeypatch.setattr(batching, "has_gpu", lambda: True)
    assert batching.parts(40, 10) == [slice(0, 40)]
