"""The genuine reference, live: `pytest parity_tests/test_upstream.py --upstream PATH`. Not collected without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rl.diffusion.schedules import ddim_schedule, ddpm_schedule
from parity_tests import drawn, drawn_vision
from parity_tests.replay import agents, case
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

from parity_tests import live  # noqa: E402

pytestmark = pytest.mark.upstream
LOSS = {"pg_loss": 1.0, "entropy_loss": 0.01, "v_loss": 0.5, "bc_loss": 0.1}


@pytest.fixture(scope="module", autouse=True)
def checkout(request):
    live.make_importable(request.config.getoption("--upstream"))


def narrow(seed: int) -> drawn.Draws:
    return drawn.Draws(seed, "float32")


@given(data=st.data(), size=drawn.sizes(), seed=drawn.seeds, batch=st.integers(1, 5))
def test_diffusion_mlp(data, size, seed, batch):
    def prepare(model: Any, d: drawn.Draws) -> dict[str, Any]:
        return {"x": d.chunk(size, batch), "time": d.integers(20, batch), "cond": {"state": d.state(size, batch)}}

    spec = data.draw(drawn.diffusion_mlps(size))
    case.replay(live.record_call(spec, "forward", prepare, ("out",), "mean_square", narrow(seed)))


@given(data=st.data(), size=drawn.sizes(), seed=drawn.seeds)
def test_critic_and_eta(data, size, seed):
    def prepare(model: Any, d: drawn.Draws) -> dict[str, Any]:
        return {"cond": {"state": d.state(size, 4)}}

    for spec, method in ((data.draw(drawn.critics(size)), "forward"), (data.draw(drawn.etas(size)), "__call__")):
        case.replay(live.record_call(spec, method, prepare, ("out",), "mean_square", narrow(seed)))


@given(data=st.data(), size=drawn.sizes(), seed=drawn.seeds, batch=st.integers(1, 3))
def test_networks_that_see(data, size, seed, batch):
    """With the reference's own shifts and dropout masks."""
    kinds = [drawn_vision.NETWORK, drawn_vision.GAUSSIAN, drawn_vision.CRITIC, drawn_vision.UNET]
    kind = data.draw(st.sampled_from(kinds))
    if kind == drawn_vision.UNET:
        size = size | {"horizon_steps": 2 * size["horizon_steps"]}
        spec, history = data.draw(drawn_vision.unets(size))
    else:
        spec, history = data.draw(drawn_vision.networks(size, kind))
    returns = ("mean", "scale") if kind == drawn_vision.GAUSSIAN else ("out",)

    def prepare(model: Any, d: drawn.Draws) -> dict[str, Any]:
        noisy = {"x": d.chunk(size, batch), "time": d.integers(20, batch)} if "diffusion" in kind else {}
        return noisy | {"cond": drawn_vision.observation(spec, d, size, batch, history)}

    case.replay(live.record_call(spec, "forward", prepare, returns, "mean_square", narrow(seed)))


@given(data=st.data(), seed=drawn.seeds)
def test_image_encoder(data, seed):
    spec = data.draw(drawn_vision.encoders(channels=data.draw(st.integers(1, 4))))
    shape = (2, *spec["kwargs"]["obs_shape"])
    flatten = {"flatten": True} if data.draw(st.booleans()) else {}

    def prepare(model: Any, d: drawn.Draws) -> dict[str, Any]:
        return {"obs": 255 * d.generator.random(shape, np.float32)} | flatten

    case.replay(live.record_call(spec, "forward", prepare, ("out",), "mean_square", narrow(seed)))


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
