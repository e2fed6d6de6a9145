"""Replay of ReinFlow's recordings that are no single call: schedules, its buffer, pre-training, whole updates."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.ema import average_into
from diffusion_rl.core.keras import floatx, precision
from diffusion_rl.core.lr_schedules import CosineWarmupRestarts, held
from diffusion_rl.core.optimizers import AdamW
from diffusion_rl.core.returns import gae
from diffusion_rl.core.reward_scaling import RunningRewardScaler
from diffusion_rl.interop import torch_names
from diffusion_rl.methods.on_policy.training import OnPolicyTraining
from diffusion_rl.networks.layers import clone, copy_weights, variables_of
from diffusion_rl.policies.flow import ShortcutFlowPolicy
from diffusion_rl.training.rollout import Rollout, episode_statistics
from parity_tests.replay.build import build, build_case, load
from parity_tests.replay.calls import caster
from parity_tests.replay.compare import Comparison
from parity_tests.replay.files import Golden
from parity_tests.replay.flow_calls import TIMES, shortcut_draws
from parity_tests.replay.scripted import ScriptedEnv, Tape

PRECISIONS = (("float32", ""), ("float64", "64"))
LOSSES = ("pg_loss", "entropy_loss", "v_loss", "bc_loss", "clipfrac", "approx_kl", "ratio")  # the first of each call
TAKEN = (
    *("update_epochs", "batch_size", "target_kl", "repeat_samples", "ent_coef", "vf_coef", "max_grad_norm"),
    *("lr_schedule", "actor_update_freq", "actor_update_epoch", "n_critic_warmup_itr"),
    *("clip_intermediate_actions", "account_for_initial_stochasticity"),
)
ABSOLUTE = ("pg_loss", "bc_loss", "approx_kl")  # differences of nearly equal numbers


def schedule(golden: Golden) -> None:
    """The noise's bounds and levels over the iterations."""
    ours = {}
    for name, (kind, given) in golden.meta["schedules"].items():
        low, high = given.get("min", given.get("level")), given.get("max", given.get("level"))
        hold, fall, warmup = (int(given.get(f"{part}_steps", 0)) for part in ("hold", "anneal", "warmup"))
        cosine = not kind.startswith("linear")
        ours[name] = [held(x, low, high, hold, fall, warmup, cosine) for x in range(golden.meta["n"])]
    Comparison(golden.name, 1, "float64").check_all(ours, golden.group("out64"), "out64/", quantity="noise schedule")


def learning_rates(golden: Golden) -> None:
    """The reference's agent steps its schedules through the whole training to draw them, and trains from there."""
    names = ("max_lr", "min_lr", "first_cycle_steps", "warmup_steps")
    cosine = CosineWarmupRestarts(**{name: golden.meta[name] for name in names})
    ours: dict[str, Any] = {"initial": [cosine.lr]}
    ours["visualize_lr"] = [cosine.step() for _ in range(golden.meta["n_train_itr"])]
    ours["used"] = [cosine.lr, *(cosine.step() for _ in range(golden.meta["n_used"] - 1))]
    Comparison(golden.name, 1, "float64").check_all(ours, golden.group("out64"), "out64/", quantity="learning rates")


def buffer(golden: Golden) -> None:
    """Statistics of episodes, scaled rewards, advantages and returns of a rollout."""
    settings, given = golden.meta["buffer"], golden.group("in")
    given["reward"] = given["reward"].astype(np.float64)
    ended = (given["terminated"] > 0) | (given["truncated"] > 0)
    reset = np.full((1, settings["n_envs"]), float(bool(golden.meta.get("first0"))))
    firsts = np.concatenate([reset, ended.astype(float)])
    rollout = Rollout(
        observations={"state": given["obs"]},
        last_observations={"state": given["last_obs"]},
        decisions={"chains": given["chains"]},
        rewards=given["reward"],
        terminated=given["terminated"],
        firsts=firsts,
    )
    stats = episode_statistics(rollout, settings["act_steps"], settings["best_reward_threshold_for_success"])
    rewards = given["reward"]
    if settings["reward_scale_running"]:
        scaler = RunningRewardScaler(settings["n_envs"], gamma=settings["gamma"])
        rewards = scaler(reward=rewards.T, first=firsts[:-1].T).T
    with precision("float64"):
        critic = build({"class": golden.meta["class"], "kwargs": golden.meta["constructor_kwargs"]})
        load(golden.name, critic, golden.weights)
        last = critic({"state": tf.constant(given["last_obs"], tf.float64)}).numpy().reshape(-1)
    arguments = (settings["gamma"], settings["gae_lambda"], settings["reward_scale_const"])
    advantages, returns = gae(rewards, given["value"], last, given["terminated"], *arguments)
    ours = {
        "avg_episode_reward": stats.mean_return,
        "avg_best_reward": stats.mean_best_reward,
        "success_rate": stats.success_rate,
        "num_episode_finished": stats.n_episodes,
        "reward_trajs": rewards,
        "firsts_trajs": firsts,
        "advantages_trajs": advantages,
        "returns_trajs": returns,
    }
    recorded = golden.group("out")
    narrow = {"advantages_trajs", "returns_trajs"}  # from a critic in single precision
    if settings["furniture_sparse_reward"]:  # there the reference counts a whole episode's reward as its best
        ours["avg_best_reward"] = stats.mean_return
        ours["success_rate"] = np.mean(stats.returns >= settings["best_reward_threshold_for_success"])
    exact = Comparison(golden.name, 3, "float64")
    for name, value in ours.items():
        comparison = Comparison(golden.name, 3, "float32") if name in narrow else exact
        comparison.check(f"out/{name}", value, recorded[name], quantity="rollouts of flows")


def pre_training(golden: Golden) -> None:
    """Two steps of flow matching with AdamW and the average of the weights."""
    meta = golden.meta
    for dtype, suffix in PRECISIONS:
        with precision(dtype):
            cast = caster(dtype)
            policy = build({"class": meta["class"], "kwargs": meta["constructor_kwargs"]})
            load(golden.name, policy, golden.weights)
            averaged = clone(policy.network)
            copy_weights(policy.network, averaged)
            variables = variables_of(policy.network)
            optimizer = AdamW(variables, meta["lr"], meta["weight_decay"])
            losses = []
            for step, draws in enumerate(_steps_of(golden)):
                actions, state = (cast(golden.arrays[f"in/{name}{step}"]) for name in ("act", "state"))
                if isinstance(policy, ShortcutFlowPolicy):
                    time, noise = shortcut_draws(draws)
                else:
                    ((fn, time), (_, noise)) = draws
                    time = TIMES[fn](time.astype(np.float64))
                with tf.GradientTape() as tape:
                    loss = policy.loss(actions, {"state": state}, cast(time), cast(noise))
                optimizer.apply(tape.gradient(loss, variables))
                losses.append(loss.numpy())
                if step % meta["update_ema_freq"] == 0:
                    decay = meta["ema_decay"] if meta["epoch"] >= meta["epoch_start_ema"] else 0.0
                    average_into(variables_of(averaged), variables, decay)
            ours = {"losses": np.array(losses)}
            for start, network in (("final", policy.network), ("ema", averaged)):
                ours |= {f"{start}.network.{k}": v for k, v in torch_names.state_dict(network).items()}
        recorded = golden.group("out" + suffix)
        comparison = Comparison(golden.name, 6, dtype)
        for name, value in recorded.items():
            comparison.check(f"out/{name}", ours[name], value, quantity="pre-training of flows")


def _steps_of(golden: Golden) -> list[list[tuple[str, np.ndarray]]]:
    """The draws of each step of pre-training, all of as many draws."""
    draws, steps = golden.draws, golden.meta["steps"]
    return [draws[i * len(draws) // steps : (i + 1) * len(draws) // steps] for i in range(steps)]


def update(golden: Golden) -> None:
    """A whole update: permutations, minibatches, both optimizers; the plain form and the one in chunks."""
    for dtype, suffix in PRECISIONS:
        for fast in (False, True):
            with precision(dtype):
                _update(golden, dtype, suffix, fast)


def _update(golden: Golden, dtype: str, suffix: str, fast: bool) -> None:
    meta, given = golden.meta, golden.group("in")
    policy = build({"class": meta["class"], "kwargs": meta["constructor_kwargs"]})
    load(golden.name, policy, golden.weights)
    policy.time_grid = "upstream" if policy.GRID == "closed" else "left"
    agent = meta["agent"]
    rates: dict[str, Any] = {}
    for name in ("actor", "critic"):
        rate = agent[f"{name}_lr"]
        rates |= {f"{name}_lr": rate, f"{name}_weight_decay": agent[f"{name}_weight_decay"]}
        rates[f"{name}_lr_scheduler"] = {"first_cycle_steps": 10, "warmup_steps": 0, "min_lr": rate}
    settings = {name: agent[name] for name in TAKEN} | rates
    settings |= {"fast": fast, "use_bc_loss": agent["use_bc_loss"], "bc_loss_coeff": agent["bc_coeff"]}
    trainer = policy.make_trainer(settings, policy.horizon_steps)
    trainer.iteration = agent["itr"]
    if agent["use_bc_loss"]:  # from zeros there
        trainer.draw = lambda rng, rows: np.zeros(policy.bc_noise_shape(rows), dtype)
    columns = (given[name] for name in ("obs", "chains", "returns", "oldvalues", "advantages", "oldlogprobs"))
    rows = trainer.load(*(np.asarray(column, dtype) for column in columns))
    train_actor = agent["itr"] >= agent["n_critic_warmup_itr"]
    losses = trainer.minibatches(rows, Tape(golden.draws), train_actor, lambda: None, lambda values: None)
    recorded = golden.group("out" + suffix)
    comparison = Comparison(golden.name, 6, dtype)
    form = "" if fast else " plain"
    for i, name in enumerate(LOSSES):
        scale = 1.0 if name in ABSOLUTE else None
        options: dict[str, Any] = {"quantity": f"ReinFlow {name}", "scale": scale}
        comparison.check(f"out/calls.{name}{form}", losses[name], recorded["calls"][:, i], **options)
    now = [trainer.learning_rates[name] for name in ("actor", "critic")]
    comparison.check(f"out/lr{form}", now, recorded["lr"], quantity="ReinFlow learning rates")
    ours = torch_names.state_dict(policy)
    for name, value in recorded.items():
        if name.startswith("final."):
            comparison.check(f"out/{name}{form}", ours[name.removeprefix("final.")], value, quantity="ReinFlow weights")


def iterations(golden: Golden) -> None:
    """The agent from its first evaluation to its last update, in a scripted environment; both forms of the update."""
    for fast in (False, True):
        with precision("float32"), tempfile.TemporaryDirectory() as folder:
            _iterations(golden, folder, fast)


def _iterations(golden: Golden, folder: str, fast: bool) -> None:
    cfg = copy.deepcopy(golden.meta["cfg"]) | {"logdir": folder}
    cfg["train"] |= {"fast": fast}
    for name in ("actor", "critic"):
        del cfg["train"][f"{name}_lr_scheduler"]["type"]
    policy, script = build_case(golden), golden.subgroup("env")
    policy.time_grid = "upstream" if policy.GRID == "closed" else "left"
    env = ScriptedEnv(script | {"final_obs": script["obs"]}, cfg["act_steps"])
    tape, records = Tape(golden.draws), list[dict[str, Any]]()
    after: list[dict[str, float]] = []

    def observe(record: dict[str, Any]) -> None:
        records.append(record)
        rates, bound = loop.trainer.learning_rates, policy.actor_ft.explore_noise_net.logvar_max
        after.append({"actor": rates["actor"], "critic": rates["critic"], "logvar_max": float(bound.numpy())})

    loop = OnPolicyTraining(cfg, venv=env, rng=tape, model=policy, observer=observe)
    _as_the_reference_begins(loop)
    loop.run()
    recorded, form = golden.group("out"), "" if fast else " plain"
    comparison = Comparison(golden.name, 7, "float32")
    comparison.check(f"out/env_actions{form}", np.stack(env.actions), recorded["env_actions"], quantity="ReinFlow")
    for i, (record, then) in enumerate(zip(records, after, strict=True)):
        ours = {name: record[name] for name in ("chains_trajs", "reward_trajs", "firsts_trajs") if name in record}
        ours["next_lr"], ours["next_logvar_max"] = [then["actor"], then["critic"]], then["logvar_max"]
        if not record["eval_mode"]:
            ours["value_trajs"] = record["values_trajs"]
            ours |= {name: record[name] for name in ("advantages_trajs", "returns_trajs")}
            ours["logprobs_trajs"] = record["logprobs_trajs"].reshape(recorded["itr1.logprobs_trajs"].shape)
        for name, value in ours.items():
            if f"itr{i}.{name}" in recorded:
                where = f"itr{i}.{name}"
                comparison.check(f"out/{where}{form}", value, recorded[where], quantity="ReinFlow, whole iterations")
    weights = torch_names.state_dict(policy)
    for name, value in recorded.items():
        if name.startswith("final."):
            own = weights[name.removeprefix("final.")]
            comparison.check(f"out/{name}{form}", own, value, quantity="ReinFlow, whole iterations")


def _as_the_reference_begins(loop: OnPolicyTraining) -> None:
    """Its schedules have been stepped through once; what an environment's last step ended is forgotten (quirks Q3, Q8);
    an evaluation draws where its chains begin and no more."""
    for _ in range(loop.total):
        loop.trainer.optimizers.advance()
    start, minibatches = loop._start, loop.trainer.minibatches
    epochs = int(loop.train["update_epochs"])

    def all_permutations(n_rows: int, rng: Any, *rest: Any) -> Any:
        """Where an update stops early, the reference goes on to draw the permutations of its epochs."""
        counted = _Counted(rng)
        losses = minibatches(n_rows, counted, *rest)
        for _ in range(epochs - counted.permutations):
            rng.permutation(n_rows)
        return losses

    def forgetful(options: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        loop.done = np.zeros(loop.n_envs)
        return start(options)

    def draw(rng: Any, n_envs: int) -> np.ndarray:
        shape = loop.model.noise_shape(n_envs)
        if loop._evaluating():
            return np.concatenate(
                [rng.normal((1, *shape[1:]), floatx()), np.zeros((shape[0] - 1, *shape[1:]), floatx())]
            )
        return rng.normal(shape, floatx())

    loop._start, loop.trainer.actor.draw = forgetful, draw  # type: ignore[method-assign]
    loop.trainer.minibatches = all_permutations  # type: ignore[method-assign]


class _Counted:
    """A source of draws that counts its permutations."""

    def __init__(self, rng: Any):
        self._rng, self.permutations = rng, 0

    def permutation(self, n: int) -> np.ndarray:
        self.permutations += 1
        return self._rng.permutation(n)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rng, name)


RUNNERS: dict[str, Callable[[Golden], None]] = {
    "schedule": schedule,
    "lr": learning_rates,
    "buffer": buffer,
    "pretrain": pre_training,
    "agent_update": update,
    "agent_run": iterations,
}
