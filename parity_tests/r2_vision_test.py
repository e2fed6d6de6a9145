"""Networks that see, beyond comparison with their twins: cameras, errors, and that encoding once changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.interop import torch_names
from diffusion_rl.networks.vision import RandomShiftsAug, ViTCritic
from diffusion_rl.networks.vit import VitEncoder
from diffusion_rl.policies.diffusion import encoded
from parity_tests import drawn, drawn_vision
from parity_tests.replay.build import build

KINDS = (drawn_vision.NETWORK, drawn_vision.GAUSSIAN, drawn_vision.CRITIC)
SIZE = {"action_dim": 2, "horizon_steps": 3, "obs_dim": 4, "cond_steps": 2}


@given(data=st.data(), seed=drawn.seeds)
@pytest.mark.parametrize("kind", (*KINDS, drawn_vision.UNET), ids=lambda kind: kind.rsplit(".", 1)[-1])
def test_state_dict_round_trip(kind, data, seed):
    unet = kind == drawn_vision.UNET
    specification, _ = data.draw(drawn_vision.unets(SIZE) if unet else drawn_vision.networks(SIZE, kind))
    one, other = (drawn.build_drawn(specification, seed + i, "float32") for i in range(2))
    weights = torch_names.state_dict(one)
    assert len(weights) == len(list(torch_names.named_parameters(one)))
    torch_names.load_state_dict(other, weights)
    back = torch_names.state_dict(other)
    assert list(back) == list(weights)
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


# --- dropout, history, cameras


def network_of(dtype: str = "float64", kind: str = drawn_vision.NETWORK, **changes: Any) -> tuple[Any, dict[str, Any]]:
    cfg = drawn.spec(drawn_vision.ENCODER_CONFIG, embed_dim=4, num_heads=2)
    steps = changes.get("img_cond_steps", 1)
    backbone = drawn.spec(
        drawn_vision.ENCODER, obs_shape=[3, 16, 24], cfg=cfg, num_channel=3 * steps, img_h=16, img_w=24
    )
    kwargs = {"backbone": backbone, "cond_dim": 8, "mlp_dims": [6], "spatial_emb": 5, "num_img": 1} | changes
    if kind == drawn_vision.UNET:
        del kwargs["mlp_dims"]
    if kind != drawn_vision.CRITIC:
        kwargs = {"action_dim": 2} | ({} if kind == drawn_vision.UNET else {"horizon_steps": 3}) | kwargs
    specification = drawn.spec(kind, **kwargs)
    return drawn.build_drawn(specification, 3, dtype), specification


@pytest.mark.parametrize("spatial_emb", [5, 0])
def test_dropout_takes_a_mask(spatial_emb):
    """Features of a kept element are those without dropout divided by 1 - rate; of a dropped one zero."""
    model, specification = network_of(dropout=0.25, spatial_emb=spatial_emb, visual_feature_dim=5)
    draws = drawn.Draws(0)
    cond = drawn_vision.observation(specification, draws, SIZE, 4, 1)
    keep = draws.integers(2, 4, 5)
    plain = model.encode(cond)["features"].numpy()
    dropped = model.encode(cond, keep_masks=[keep])["features"].numpy()
    np.testing.assert_allclose(dropped[:, :5], plain[:, :5] * keep / 0.75, rtol=1e-14)
    np.testing.assert_array_equal(dropped[:, 5:], plain[:, 5:])


@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.rsplit(".", 1)[-1])
def test_history_may_be_longer_than_the_images_used(kind, cameras):
    """Quirk 10: with two cameras the reference cannot. What comes before the latest images does not matter."""
    model, specification = network_of(kind=kind, num_img=cameras, img_cond_steps=2)
    draws = drawn.Draws(1)
    cond = drawn_vision.observation(specification, draws, SIZE, 3, 4)
    recent = cond | {"rgb": cond["rgb"][:, -2:]}
    np.testing.assert_array_equal(model.encode(cond)["features"], model.encode(recent)["features"])


@pytest.mark.parametrize("changes", [{"spatial_emb": 0, "visual_feature_dim": 6}, {"cond_mlp_dims": [5, 3]}], ids=str)
def test_unets_that_the_reference_cannot_build(changes):
    """Quirk 9: without the spatial embedding, and with an encoder of the state that changes its width."""
    model, specification = network_of(kind=drawn_vision.UNET, dim=2, dim_mults=[1, 2], **changes)
    draws = drawn.Draws(1)
    cond = drawn_vision.observation(specification, draws, SIZE, 2, 1)
    x, t = draws.normal(2, 4, 2), draws.integers(5, 2)
    out = model(x, t, cond)
    assert out.shape == x.shape
    np.testing.assert_array_equal(out, model(x, t, model.encode(cond)))


def test_shifted_images_by_hand():
    """A row 0 1 2 3 shifted by (x, y) = (pad + 1, pad) loses its first pixel and repeats its last."""
    row = tf.constant([[[[0, 1, 2, 3]]]], tf.uint8)
    aug = RandomShiftsAug(pad=4)
    assert aug(row, [[5, 4]]).numpy().ravel().tolist() == [1, 2, 3, 3]
    assert aug(row, [[2, 8]]).numpy().ravel().tolist() == [0, 0, 0, 1]
    assert aug(row, [[4, 4]]).dtype == tf.uint8


def test_cameras_start_alike_with_weights_of_their_own():
    model, _ = network_of(num_img=2)
    with precision("float64"), initial_weights(NoiseSource(0)):
        fresh = build(network_of(num_img=2)[1])
    weights = torch_names.state_dict(fresh)
    np.testing.assert_array_equal(weights["compress1.weight"], weights["compress2.weight"])
    assert fresh.vision.compress1.weight is not fresh.vision.compress2.weight


# --- errors are one line


@pytest.mark.parametrize("style, side", [("embed1", 60), ("embed2", 50), ("embed2", 84), ("embed2", 8)])
def test_images_that_do_not_divide(style, side):
    """Quirk 11: the reference counts patches its convolutions do not make, and fails in the first call."""
    with pytest.raises(UserError, match=f"image side {side}"):
        VitEncoder(cfg={"embed_style": style}, img_h=96, img_w=side)


def test_what_does_not_fit_is_said_in_one_line():
    model, specification = network_of()
    cond = drawn_vision.observation(specification, drawn.Draws(2), SIZE, 2, 1)
    with pytest.raises(UserError, match="rgb"):
        model.encode({"state": cond["state"]})
    with pytest.raises(UserError, match="num_channel, img_h"):
        model.encode(cond | {"rgb": cond["rgb"][..., :16]})
    with pytest.raises(UserError, match="augment=false"):
        model.encode(cond, shifts=np.zeros((2, 1, 2), int))
    with pytest.raises(UserError, match="num_heads"):
        VitEncoder(cfg={"embed_dim": 6, "num_heads": 4})
    with pytest.raises(UserError, match="embed_style"):
        VitEncoder(cfg={"embed_style": "embed3"})
    for kwargs in ({"spatial_emb": 0, "num_img": 2}, {"spatial_emb": 1}):  # quirk 10
        with pytest.raises(UserError, match="spatial_emb"):
            network_of(**kwargs)
    with pytest.raises(UserError, match="spatial_emb"):
        ViTCritic(VitEncoder(cfg={"embed_dim": 4}), 8, spatial_emb=0, mlp_dims=[4])


# --- every observation is encoded once


class Plain:
    """A network that sees the images again in every call."""

    def __init__(self, network: Any):
        self.network = network

    def __call__(self, x: Any, t: Any, cond: Any) -> Any:
        return self.network(x, t, cond)


@pytest.fixture
def encodings(monkeypatch):
    """Counts how often images are looked at."""
    calls, call = [], VitEncoder.call
    monkeypatch.setattr(VitEncoder, "call", lambda self, *args: calls.append(1) or call(self, *args))
    return calls


@pytest.mark.parametrize("ddim", [False, True])
def test_encoding_once_changes_nothing(ddim, encodings):
    _, network = network_of()
    size = {k: SIZE[k] for k in ("action_dim", "horizon_steps", "obs_dim")}
    sampling = {"use_ddim": True, "ddim_steps": 5} if ddim else {}
    eta = {"eta": drawn.spec(drawn.ETA + "EtaFixed", base_eta=0.5)} if ddim else {}
    kwargs = dict(actor=network, denoising_steps=10, ft_denoising_steps=3, **size, **sampling, **eta)
    tuned = drawn.build_drawn(drawn.spec(drawn.FINE_TUNED, **kwargs), 5, "float64")
    draws = drawn.Draws(4)
    cond = drawn_vision.observation(network, draws, SIZE, 2, 1)
    noise = draws.chunk(SIZE, tuned.sampling_steps + 1, 2)

    def results() -> tuple[list[Any], list[int]]:
        values, counts = [], []
        for base in (False, True):
            encodings.clear()
            sample = tuned.sample(cond, noise, use_base_policy=base, with_log_probs=True)
            counts.append(len(encodings))
            encodings.clear()
            values += [*sample, tuned.log_probs(cond, sample.chains, use_base_policy=base)[0]]
            counts.append(len(encodings))
        return [value.numpy() for value in values], counts

    once, counts = results()
    assert counts == [2, 1, 1, 1]  # the pre-trained and the fine-tuned network have encoders of their own
    tuned.actor, tuned.actor_ft = Plain(tuned.actor), Plain(tuned.actor_ft)
    again, counts = results()
    assert counts == [tuned.sampling_steps, 1, tuned.sampling_steps, 1]
    for one, other in zip(once, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_a_pretrained_policy_encodes_once(encodings):
    _, network = network_of()
    size = {k: SIZE[k] for k in ("action_dim", "horizon_steps", "obs_dim")}
    policy = drawn.build_drawn(drawn.spec(drawn.PRETRAINED, network=network, denoising_steps=6, **size), 5, "float64")
    draws = drawn.Draws(4)
    cond, noise = drawn_vision.observation(network, draws, SIZE, 2, 1), draws.chunk(SIZE, 7, 2)
    once = policy.sample(cond, noise).trajectories
    assert len(encodings) == 1
    seen = encoded(policy.network, cond)
    assert encoded(policy.network, seen) is seen
    t, chunk = draws.integers(6, 2), draws.chunk(SIZE, 2)
    np.testing.assert_array_equal(policy.loss(chunk, cond, t, chunk), policy.loss(chunk, seen, t, chunk))
    steps = policy.sampling_steps
    policy.network, encodings[:] = Plain(policy.network), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(policy), "dtype", tf.float64)
        np.testing.assert_allclose(policy.sample(cond, noise).trajectories, once, rtol=0, atol=1e-12)
    assert len(encodings) == steps
