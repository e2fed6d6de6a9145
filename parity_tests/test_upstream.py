"""The genuine reference, live: `pytest parity_tests/test_upstream.py --upstream PATH`. Not collected without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rl.core.keras import precision
from diffusion_rl.diffusion.schedules import ddim_schedule, ddpm_schedule
from diffusion_rl.interop import torch_names
from diffusion_rl.networks.critics import CriticEnsemble
from parity_tests import drawn, drawn_networks
from parity_tests.replay import agents, case
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

from parity_tests import live  # noqa: E402

pytestmark = pytest.mark.upstream
GAUSSIAN, GMM = "model.common.gaussian.GaussianModel", "model.common.gmm.GMMModel"
PPO_GAUSSIAN, PPO_GMM = "model.rl.gaussian_ppo.PPO_Gaussian", "model.rl.gmm_ppo.PPO_GMM"
LIKELIHOODS = ("Gaussian_MLP", "Gaussian_Transformer", "GMM_MLP", "GMM_Transformer")
LOSS = {"pg_loss": 1.0, "entropy_loss": 0.01, "v_loss": 0.5, "bc_loss": 0.1}


@pytest.fixture(scope="module", autouse=True)
def checkout(request):
    live.make_importable(request.config.getoption("--upstream"))


def narrow(seed: int) -> drawn.Draws:
    return drawn.Draws(seed, "float32")


# RandomShiftsAug is no module there: it is seen in the networks that augment
@pytest.mark.parametrize("kind", [kind for kind in drawn_networks.KINDS if kind != "RandomShiftsAug"])
@given(data=st.data(), seed=drawn.seeds)
def test_network(kind, data, seed):
    """With the reference's own shifts and dropout masks."""
    spec, prepare = data.draw(drawn_networks.calls(kind, genuine=True))
    method = "__call__" if kind == "Eta" else "forward"
    case.replay(live.record_call(spec, method, lambda model, d: prepare(d), None, "mean_square", narrow(seed)))


@given(data=st.data(), size=drawn.sizes(), seed=drawn.seeds, members=st.integers(2, 4))
def test_critic_ensemble(data, size, seed, members):
    """Stacked and mapped by torch.func, as RLPD and IBRL do."""
    spec = drawn_networks.action_critics(data.draw, size, double_q=False)
    draws = narrow(seed)
    networks = [live.build(spec).double() for _ in range(members)]
    for network in networks:
        live.scramble(network, draws)
    stacked, buffers = torch.func.stack_module_state(networks)
    with precision("float64"):
        ensemble = CriticEnsemble([drawn.build_drawn(spec, seed, "float64") for _ in range(members)])
    torch_names.load_state_dict(ensemble, {name: value.detach().numpy() for name, value in stacked.items()})
    state, action = (x.astype(np.float64) for x in (draws.state(size, 3), draws.chunk(size, 3)))

    def values(parameters: Any, buffers: Any, data: Any) -> Any:
        return torch.func.functional_call(networks[0], (parameters, buffers), data)

    inputs = {"state": torch.from_numpy(state)}, torch.from_numpy(action)
    theirs = torch.vmap(values, in_dims=(0, 0, None))(stacked, buffers, inputs)
    found = torch.autograd.grad(theirs.square().mean(), list(stacked.values()))
    with tf.GradientTape() as tape:
        ours = ensemble({"state": state}, action)
        total = tf.reduce_mean(tf.square(ours))
    comparison = Comparison("critic ensemble, live", 2, "float64")
    comparison.check("values", ours, theirs.detach(), scale=max(1.0, float(theirs.detach().abs().max())))
    grads = {name: grad.numpy() for name, grad in zip(stacked, found, strict=True)}
    scale = max(float(np.abs(grad).max()) for grad in grads.values())
    comparison.check_all(case.torch_gradients(ensemble, tape, total), grads, "grad ", rung=4, scale=max(scale, 1e-12))


@st.composite
def likelihood_policies(draw: Any, kind: str, tuned: bool) -> tuple[dict[str, Any], drawn_networks.Size, int]:
    """A policy on a Gaussian or mixture network, pre-trained or tuned by PPO; the sizes; the batch."""
    size, batch = draw(drawn.sizes()), draw(st.integers(2, 5))
    network, _ = drawn_networks.KINDS[kind](draw, size, batch, True)
    if "dropout" in network["kwargs"]:
        network["kwargs"]["dropout"] = 0
    mixture = kind.startswith("GMM")
    options: dict[str, Any] = {"horizon_steps": size["horizon_steps"], "device": "cpu"}
    if not mixture:
        options |= {"randn_clip_value": draw(st.sampled_from([0.7, 10])), "tanh_output": draw(st.booleans())}
    if not tuned:
        return drawn.spec(GMM if mixture else GAUSSIAN, network=network, **options), size, batch
    options |= {"clip_ploss_coef": draw(st.sampled_from([0.01, 0.2])), "norm_adv": draw(st.booleans())}
    options |= {"clip_vloss_coef": draw(st.sampled_from([None, 0.1]))}
    cls = PPO_GMM if mixture else PPO_GAUSSIAN
    return drawn.spec(cls, actor=network, critic=draw(drawn.critics(size)), **options), size, batch


@pytest.mark.parametrize("kind", LIKELIHOODS)
@given(data=st.data(), seed=drawn.seeds, deterministic=st.booleans(), reparameterize=st.booleans())
def test_likelihood_policy(kind, data, seed, deterministic, reparameterize):
    spec, size, batch = data.draw(likelihood_policies(kind, tuned=False))
    mixture = kind.startswith("GMM")

    def sampling(model: Any, d: drawn.Draws) -> dict[str, Any]:
        more = {} if mixture else {"reparameterize": reparameterize, "get_logprob": True}
        return {"cond": {"state": d.state(size, batch)}, "deterministic": deterministic} | more

    def losses(model: Any, d: drawn.Draws) -> dict[str, Any]:
        cond = {"state": d.state(size, batch)}
        return {"true_action": d.chunk(size, batch), "cond": cond} | ({} if mixture else {"ent_coef": 0.01})

    returns = ("out",) if mixture else ("action", "logprob")
    case.replay(live.record_call(spec, "forward", sampling, returns, None, narrow(seed)))
    case.replay(live.record_call(spec, "loss", losses, ("loss", "infos"), {"loss": 1.0}, narrow(seed)))


@pytest.mark.parametrize("kind", LIKELIHOODS)
@given(data=st.data(), seed=drawn.seeds, base=st.booleans(), deterministic=st.booleans())
def test_likelihood_ppo(kind, data, seed, base, deterministic):
    spec, size, batch = data.draw(likelihood_policies(kind, tuned=True))
    use_bc = {} if kind.startswith("GMM") else {"use_bc_loss": data.draw(st.booleans())}
    use_base = {} if kind.startswith("GMM") else {"use_base_policy": base}

    def sampling(model: Any, d: drawn.Draws) -> dict[str, Any]:
        return {"cond": {"state": d.state(size, batch)}, "deterministic": deterministic} | use_base

    def densities(model: Any, d: drawn.Draws) -> dict[str, Any]:
        return {"cond": {"state": d.state(size, batch)}, "actions": d.chunk(size, batch)} | use_base

    def losses(model: Any, d: drawn.Draws) -> dict[str, Any]:
        state = d.state(size, batch)
        cond = {"state": torch.from_numpy(state)}
        with live.Source(d).active(), torch.no_grad():
            actions = model(cond)
            old, values = model.get_logprobs(cond, actions)[0].numpy(), model.critic(cond).numpy()[:, 0]
        return {
            "obs": {"state": state},
            "actions": actions.numpy(),
            "returns": values + d.normal(batch, scale=0.5),
            "oldvalues": values + d.normal(batch, scale=0.15),
            "advantages": d.normal(batch, scale=2.0),
            "oldlogprobs": old + d.normal(batch, scale=0.05),
        } | use_bc

    parts = (*live.LOSS_PARTS[:-1], "std")
    case.replay(live.record_call(spec, "forward", sampling, ("out",), None, narrow(seed)))
    case.replay(live.record_call(spec, "get_logprobs", densities, ("logprobs", "entropy", "std"), None, narrow(seed)))
    case.replay(live.record_call(spec, "loss", losses, parts, LOSS, narrow(seed)))


@given(steps=st.integers(1, 120), share=st.integers(1, 8))
def test_schedules(steps, share):
    ddim_steps = max(1, steps // share)
    network = drawn.spec(drawn.NETWORK, action_dim=1, horizon_steps=1, cond_dim=1, mlp_dims=[2])
    sizes = {"horizon_steps": 1, "obs_dim": 1, "action_dim": 1}
    sampling = {"denoising_steps": steps, "use_ddim": True, "ddim_steps": ddim_steps}
    theirs = live.build(drawn.spec(drawn.PRETRAINED, network=network, **sizes, **sampling))
    ddpm = ddpm_schedule(steps)
    tables = vars(ddpm) | vars(ddim_schedule(ddpm, ddim_steps))
    comparison = Comparison("schedules, live", 1, "float32")
    for name, value in tables.items():
        comparison.check(name, value, getattr(theirs, name).numpy())


@given(drawn.policies(drawn.PRETRAINED), drawn.seeds, st.integers(1, 5))
def test_pretrained_policy(policy, seed, batch):
    spec, size = policy

    def rows(model: Any, d: drawn.Draws) -> tuple[np.ndarray, np.ndarray | None]:
        index = d.integers(len(model.ddim_t), batch) if model.use_ddim else None
        return (d.integers(model.denoising_steps, batch) if index is None else model.ddim_t.numpy()[index]), index

    def step(model: Any, d: drawn.Draws) -> dict[str, Any]:
        t, index = rows(model, d)
        arguments = {"x": d.chunk(size, batch), "t": t, "cond": {"state": d.state(size, batch)}}
        return arguments if index is None else arguments | {"index": index}

    def losses(model: Any, d: drawn.Draws) -> dict[str, Any]:
        t = d.integers(model.denoising_steps, batch)
        return {"x_start": d.chunk(size, batch), "cond": {"state": d.state(size, batch)}, "t": t}

    case.replay(live.record_call(spec, "p_mean_var", step, ("mu", "logvar"), None, narrow(seed)))
    case.replay(live.record_call(spec, "p_losses", losses, ("loss",), {"loss": 1.0}, narrow(seed)))


@given(drawn.policies(drawn.FINE_TUNED), drawn.seeds, st.integers(1, 4), st.booleans(), st.booleans())
def test_fine_tuned_policy(policy, seed, batch, deterministic, base):
    spec, size = policy

    def sampling(model: Any, d: drawn.Draws) -> dict[str, Any]:
        return {"cond": {"state": d.state(size, batch)}, "deterministic": deterministic, "use_base_policy": base}

    def chains(model: Any, d: drawn.Draws) -> dict[str, Any]:
        state, sample = sample_of(model, d, size, batch)
        return {"cond": {"state": state}, "chains": sample, "get_ent": True, "use_base_policy": base}

    case.replay(live.record_call(spec, "forward", sampling, ("trajectories", "chains"), None, narrow(seed)))
    case.replay(live.record_call(spec, "get_logprobs", chains, ("logprobs", "eta"), None, narrow(seed)))


def sample_of(model: Any, d: drawn.Draws, size: dict[str, int], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Observations and the reference's own chains from them."""
    state = d.state(size, batch)
    with live.Source(d).active():
        return state, model.forward({"state": torch.from_numpy(state)}).chains.numpy()


@given(drawn.policies(), drawn.seeds, st.integers(3, 9), st.integers(1, 6), st.booleans())
def test_ppo_loss(policy, seed, batch, reward_horizon, use_bc):
    spec, size = policy

    def prepare(model: Any, d: drawn.Draws) -> dict[str, Any]:
        state, chains = sample_of(model, d, size, batch)
        inds, rows = d.integers(chains.shape[1] - 1, batch), np.arange(batch)
        previous, following = chains[rows, inds], chains[rows, inds + 1]
        with torch.no_grad():
            old = model.get_logprobs_subsample(
                {"state": torch.from_numpy(state)}, *map(torch.from_numpy, (previous, following, inds))
            ).numpy()
            values = model.critic({"state": torch.from_numpy(state)}).numpy()[:, 0]
        return {
            "obs": {"state": state},
            "chains_prev": previous,
            "chains_next": following,
            "denoising_inds": inds,
            "returns": values + d.normal(batch, scale=0.5),
            "oldvalues": values + d.normal(batch, scale=0.15),
            "advantages": d.normal(batch, scale=2.0),
            "oldlogprobs": old + d.normal(*old.shape, scale=0.05),
            "use_bc_loss": use_bc,
            "reward_horizon": reward_horizon,
        }

    case.replay(live.record_call(spec, "loss", prepare, live.LOSS_PARTS, LOSS, narrow(seed)))


# ---------- whole runs ----------

ETA_ACTION = drawn.spec(drawn.ETA + "EtaAction", action_dim=2, base_eta=0.7)
ETA_FIXED = drawn.spec(drawn.ETA + "EtaFixed", base_eta=1, max_eta=1.3)
DDIM = {"denoising_steps": 16, "use_ddim": True, "ddim_steps": 4}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddim": {"model": DDIM | {"ft_denoising_steps": 2, "eta": ETA_FIXED}, "train": {"reward_scale_running": False}},
    "eta learned, imitation": {
        "model": DDIM | {"ft_denoising_steps": 3, "eta": ETA_ACTION, "learn_eta": True},
        "train": {
            "use_bc_loss": True,
            "bc_loss_coeff": 0.2,
            "ent_coef": 0.02,
            "eta_lr": 1e-2,
            "eta_weight_decay": 0.0,
            "eta_update_interval": 2,
            "eta_lr_scheduler": {"first_cycle_steps": 8, "warmup_steps": 1, "min_lr": 1e-3},
        },
    },
    "critic first, quantiles": {
        "model": {"norm_adv": False, "clip_advantage_lower_quantile": 0.1, "clip_advantage_upper_quantile": 0.8},
        "train": {"n_critic_warmup_itr": 1, "n_train_itr": 3},
        "top": {"reward_horizon": 1},
    },
    "stopped by the divergence": {
        "model": {"clip_ploss_coef": 0.4},
        "train": {
            "target_kl": 1e-6,
            "actor_lr": 1e-2,
            "actor_lr_scheduler": {"first_cycle_steps": 9, "warmup_steps": 0, "min_lr": 1e-2},
        },
    },
    "annealing": {"model": {"ft_denoising_steps_d": 1, "ft_denoising_steps_t": 1}, "train": {"batch_size": 50}},
    "evaluations between": {
        "train": {"force_train": False, "val_freq": 2, "n_train_itr": 4, "max_grad_norm": 0.2},
        "env": {"reset_at_iteration": False},
    },
    "history, all steps, clipped values": {
        "model": {"ft_denoising_steps": 6, "clip_vloss_coef": 0.1},
        "train": {"gamma": 0.9, "gae_lambda": 0.7, "reward_scale_const": 0.4, "critic_weight_decay": 0.1},
        "top": {"cond_steps": 2},
    },
    "plain multi-layer perceptrons": {"network": {"residual_style": False, "use_layernorm": True}},
    "part of the chunk executed": {"top": {"act_steps": 2}},
}


@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name):
    options = RUNS[name]
    top = {"cond_steps": 1, "obs_dim": 4, "action_dim": 2, "act_steps": 3, "horizon_steps": 3} | options.get("top", {})
    cond_dim = top["cond_steps"] * top["obs_dim"]
    dims = {"mlp_dims": [9, 9, 9], "residual_style": True} | options.get("network", {})
    model = {
        "actor": drawn.spec(drawn.NETWORK, action_dim=2, horizon_steps=3, cond_dim=cond_dim, time_dim=8, **dims),
        "critic": drawn.spec(drawn.CRITIC, cond_dim=cond_dim, **dims),
        "denoising_steps": 6,
        "ft_denoising_steps": 3,
        "gamma_denoising": 0.95,
        "clip_ploss_coef": 0.05,
        "randn_clip_value": 3,
        "min_sampling_denoising_std": 0.1,
    }
    model |= {k: top[k] for k in ("horizon_steps", "obs_dim", "action_dim")} | options.get("model", {})
    schedule = {"first_cycle_steps": 10, "warmup_steps": 2, "min_lr": 1e-4}
    train = {
        "n_train_itr": 2, "n_critic_warmup_itr": 0, "n_steps": 4, "gamma": 0.99, "gae_lambda": 0.95,
        "actor_lr": 1e-3, "actor_weight_decay": 1e-3, "actor_lr_scheduler": schedule,
        "critic_lr": 2e-3, "critic_weight_decay": 0.0, "critic_lr_scheduler": schedule,
        "save_model_freq": 1, "val_freq": 100, "force_train": True, "render": {"freq": 1, "num": 0}, "log_freq": 1,
        "reward_scale_running": True, "reward_scale_const": 1.0, "batch_size": 11, "update_epochs": 2,
        "vf_coef": 0.5, "target_kl": None, "logprob_batch_size": 6, "max_grad_norm": None,
    } | options.get("train", {})  # fmt: skip
    env = {
        "name": "scripted", "n_envs": 3, "max_episode_steps": 50, "reset_at_iteration": True,
        "best_reward_threshold_for_success": 1, "wrappers": None,
    } | options.get("env", {})  # fmt: skip
    cfg = {"device": "cpu", "seed": 1, "wandb": None, "model": "model", "logdir": "", "env": env, "train": train} | top
    golden = live.record_agent(f"run: {name}", drawn.spec(drawn.PPO, **model), cfg, narrow(len(name)))
    agents.replay(golden)
