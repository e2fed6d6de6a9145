"""Rung 7: whole iterations of the loop on drawn sizes against a PyTorch twin of the algorithm, rollout to weights.

The recordings hold the genuine reference's iterations; here sizes and options are drawn.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_rl.core.keras import precision
from diffusion_rl.interop import torch_names
from diffusion_rl.methods.on_policy.training import OnPolicyTraining
from parity_tests import drawn
from parity_tests.replay.compare import Comparison
from parity_tests.replay.scripted import ScriptedEnv, Tape

torch = pytest.importorskip("torch")

RATES = {"first_cycle_steps": 10, "warmup_steps": 0, "min_lr": 1e-3}  # constant: rungs 1 and 5 are about schedules


def twin_iteration(twin: Any, script: dict, draws: list, train: dict, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Collect on the script, estimate advantages, update; everything by name."""
    steps, envs, reward_horizon = sizes
    take = iter(draws)
    frames = [script["reset_obs"][0], *script["obs"]]
    states, chains = [torch.from_numpy(f) for f in frames], []
    with torch.no_grad():
        for t in range(steps):
            noise = torch.from_numpy(np.stack([next(take) for _ in range(twin.steps + 1)]))
            chains.append(twin.sample(states[t], noise, deterministic=False)[1])
        rows, chain = torch.cat(states[:steps]), torch.cat(chains)
        values = twin.value(rows)
        old = twin.chain_log_probs(rows, chain)[0].unflatten(0, (-1, twin.tuned))
        after = torch.cat([values.view(steps, envs), twin.value(states[steps])[None]])
    alive = torch.from_numpy(1.0 - script["terminated"])
    reward = torch.from_numpy(script["reward"])
    advantage, last = torch.zeros(steps, envs, dtype=torch.float64), torch.zeros(envs, dtype=torch.float64)
    for t in reversed(range(steps)):
        error = reward[t] + train["gamma"] * alive[t] * after[t + 1] - after[t]
        advantage[t] = last = error + train["gamma"] * train["gae_lambda"] * alive[t] * last
    returns = (advantage + after[:-1]).flatten()
    optimizers = {
        part: torch.optim.AdamW(
            [w for n, w in twin.weights.items() if n.startswith(part + ".")], lr=1e-3, weight_decay=d
        )
        for part, d in (("actor_ft", train["actor_weight_decay"]), ("critic", train["critic_weight_decay"]))
    }
    losses, size = [], train["batch_size"]
    for _ in range(train["update_epochs"]):
        order = torch.from_numpy(next(take))
        for k in range(max(1, len(order) // size)):
            sample, inds = (
                order[k * size : (k + 1) * size] // twin.tuned,
                order[k * size : (k + 1) * size] % twin.tuned,
            )
            parts = twin.ppo_loss(
                rows[sample], chain[sample, inds], chain[sample, inds + 1], inds,
                returns[sample], values[sample], advantage.flatten()[sample], old[sample, inds], reward_horizon,
            )  # fmt: skip
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            (parts["pg_loss"] + train["vf_coef"] * parts["v_loss"]).backward()
            torch.nn.utils.clip_grad_norm_(optimizers["actor_ft"].param_groups[0]["params"], train["max_grad_norm"])
            for optimizer in optimizers.values():
                optimizer.step()
            losses.append([float(parts[n].detach()) for n in ("pg_loss", "v_loss", "approx_kl")])
    return {"chains": torch.stack(chains), "values": after[:-1], "advantages": advantage, "losses": np.array(losses)}


@settings(max_examples=4)
@given(drawn.policies(), drawn.seeds, st.integers(1, 3), st.integers(2, 4), st.booleans())
def test_iteration(policy, seed, envs, steps, fast):
    specification, size = policy
    specification["kwargs"]["learn_eta"] = False
    model, draws = drawn.build_drawn(specification, seed, "float64"), drawn.Draws(seed)
    twin = drawn.twin_of(model, specification)
    for name, tensor in twin.weights.items():
        tensor.requires_grad_(name.startswith(("actor_ft.", "critic.")))
    n_rows = envs * steps * model.ft_denoising_steps
    act_steps = 1 + seed % size["horizon_steps"]
    train = {
        "n_train_itr": 1, "n_critic_warmup_itr": 0, "n_steps": steps, "gamma": 0.97, "gae_lambda": 0.9,
        "actor_lr": 1e-3, "actor_weight_decay": 1e-2, "actor_lr_scheduler": RATES,
        "critic_lr": 1e-3, "critic_weight_decay": 1e-3, "critic_lr_scheduler": RATES,
        "save_model_freq": 1, "val_freq": 9, "force_train": True, "reward_scale_running": False, "vf_coef": 0.5,
        "batch_size": max(2, n_rows // 2), "update_epochs": 2, "target_kl": None, "max_grad_norm": 0.5, "fast": fast,
    }  # fmt: skip
    frames = (envs, size["cond_steps"], size["obs_dim"])
    script = {
        "reset_obs": draws.normal(1, *frames), "obs": draws.normal(steps, *frames),
        "final_obs": draws.normal(steps, *frames), "reward": draws.normal(steps, envs),
        "terminated": draws.normal(steps, envs) > 1, "truncated": np.zeros((steps, envs), bool),
    }  # fmt: skip
    noise = [draws.chunk(size, envs) for _ in range(steps * (model.sampling_steps + 1))]
    permutations = [draws.generator.permutation(n_rows) for _ in range(train["update_epochs"])]
    theirs = twin_iteration(twin, script, [*noise, *permutations], train, (steps, envs, act_steps))
    tape = Tape([("torch.randn", n) for n in noise] + [("torch.randperm", p) for p in permutations])
    seen: list[dict[str, Any]] = []
    env = {"n_envs": envs, "reset_at_iteration": True, "max_episode_steps": 99, "best_reward_threshold_for_success": 1}
    with precision("float64"), tempfile.TemporaryDirectory() as folder:
        cfg = {"seed": 1, "wandb": None, "logdir": folder, "env": env, "train": train, "act_steps": act_steps}
        cfg |= {"cond_steps": size["cond_steps"], "obs_dim": size["obs_dim"], "action_dim": size["action_dim"]}
        cfg["horizon_steps"] = size["horizon_steps"]
        OnPolicyTraining(cfg, model=model, venv=ScriptedEnv(script, act_steps), rng=tape, observer=seen.append).run()
    comparison = Comparison("whole iterations, drawn", 7, "float64")
    comparison.check("chains", seen[0]["chains_trajs"], theirs["chains"])
    comparison.check("values", seen[0]["values_trajs"], theirs["values"])
    comparison.check("advantages", seen[0]["advantages_trajs"], theirs["advantages"])
    ours = np.stack([seen[0]["losses"][n] for n in ("pg_loss", "v_loss", "approx_kl")], 1)
    comparison.check("losses", ours, theirs["losses"], scale=max(1.0, float(np.abs(theirs["losses"]).max())))
    for name, value in torch_names.state_dict(model).items():
        comparison.check(name, value, twin.weights[name].detach(), quantity="final weights", scale=1.0)
