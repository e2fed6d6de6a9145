"""Home-made data for the locomotion tasks: train SAC up to a given return, roll it out, write npz.

D4RL's files cannot be shipped with this repository; `data/gym/README.md` says what was made instead and how it differs.
`script/dataset/make_gym_data.py` is the command.

Shape letters: E environments, O observation, A action, U updates per compiled call, B batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.config.schema import require_range
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file, require_file, require_writable
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.core.npz import read_npz, write_npz
from diffusion_rl.core.places import data_folder
from diffusion_rl.core.typing import Rng
from diffusion_rl.data.episodes import (
    Episodes,
    bounds_of,
    load_episodes,
    load_unscaled,
    save_episodes,
    scale_episodes,
)
from diffusion_rl.data.replay import ReplayBuffer, fields
from diffusion_rl.envs.locomotion import LocomotionVectorEnv
from diffusion_rl.generate.gym_settings import EXPERT_RETURN, MEDIUM_RETURN, Settings
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.methods.off_policy.algorithm import Phase
from diffusion_rl.methods.off_policy.buffers import Buffers, Rows
from diffusion_rl.methods.off_policy.learner import Learner
from diffusion_rl.methods.off_policy.sac import SAC
from diffusion_rl.networks.critics import CriticObsAct
from diffusion_rl.networks.gaussian import GaussianMLP
from diffusion_rl.tasks.registry import D4RL_STEPS

MAX_FILE_BYTES = 8_000_000
MANTISSA_BITS = 15  # kept of the normalised states and actions: an error below 2e-5, and a quarter less to ship


def make_envs(task: str, n_envs: int, seed: int) -> LocomotionVectorEnv:
    """Builds raw environments in which the time limit is a truncation, never a termination."""
    seeds = range(seed, seed + n_envs)
    return LocomotionVectorEnv(
        f"{task}-medium-v2", n_envs, max_episode_steps=D4RL_STEPS, d4rl_time_limit=None, seeds=seeds, threads=1
    )


def make_policy(obs_dim: int, action_dim: int, settings: Settings) -> SAC:
    """Builds the reference's SAC networks: two hidden layers (of 256 by default), ReLU."""
    dims = [settings.hidden, settings.hidden]
    common: dict[str, Any] = {"cond_dim": obs_dim, "mlp_dims": dims, "activation_type": "ReLU"}
    with initial_weights(NoiseSource(settings.seed)):
        actor = GaussianMLP(action_dim, 1, tanh_output=False, std_min=0.0067, std_max=7.3891, **common)
        critic = CriticObsAct(action_dim=action_dim, use_layernorm=settings.critic_layernorm, **common)
    return SAC(actor, critic, horizon_steps=1, tanh_output=True)


class Sampler:
    """Draws stochastic actions [E,1,A] for raw observations [E,1,O], without retracing for the same E."""

    def __init__(self, policy: SAC, rng: Rng, action_dim: int):
        self.rng, self.action_dim = rng, action_dim
        self._sample = tf.function(lambda obs, noise: policy.sample({"state": obs}, noise)[0])

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Draws actions [E,1,A] for raw observations [E,1,O]."""
        noise = self.rng.normal((len(obs), self.action_dim))
        return self._sample(tf.constant(obs, tf.float32), tf.constant(noise)).numpy()


def roll_out(sampler: Sampler, envs: LocomotionVectorEnv, enough: Callable[[int, int], bool]) -> Episodes:
    """Collects whole episodes of the stochastic policy, from fresh resets, in the order in which they end.

    Once `enough(ended episodes, transitions so far)` holds, no episode is begun, but those still running are finished
    and kept, so that short ones are not over-represented.
    """
    obs = envs.reset()["state"]
    running = np.ones(envs.n_envs, bool)
    open_steps: list[list[tuple]] = [[] for _ in range(envs.n_envs)]
    finished: list[list[tuple]] = []
    transitions = 0
    while running.any():
        actions = sampler(obs)
        result = envs.step(actions)
        transitions += int(running.sum())
        for i in np.flatnonzero(running):
            open_steps[i].append((obs[i, 0], actions[i, 0], result.rewards[i], result.terminated[i]))
            if result.terminated[i] or result.truncated[i]:
                finished.append(open_steps[i])
                open_steps[i] = []
                running[i] = not enough(len(finished), transitions)
        obs = result.observations["state"]
    states, actions, rewards, terminals = (np.array(x) for x in zip(*sum(finished, []), strict=True))
    return Episodes(
        states=states.astype(np.float32),
        actions=actions.astype(np.float32),
        traj_lengths=np.array([len(steps) for steps in finished]),
        rewards=rewards.astype(np.float32),
        terminals=terminals.astype(bool),
    )


def statistics(episodes: Episodes) -> dict[str, Any]:
    """Returns numbers for the README: episodes, transitions, returns and lengths."""
    returns, lengths = episodes.returns, np.asarray(episodes.traj_lengths)
    quantiles = {f"q{percent:02d}": np.quantile(returns, percent / 100) for percent in (5, 25, 50, 75, 95)}
    spread = {"mean": returns.mean(), "std": returns.std(), "min": returns.min(), "max": returns.max()} | quantiles
    return {
        "episodes": len(lengths),
        "transitions": int(lengths.sum()),
        "terminated_episodes": int(np.asarray(episodes.terminals).sum()),
        "return": {k: round(float(v), 1) for k, v in spread.items()},
        "length": {
            "mean": round(float(lengths.mean()), 1),
            "std": round(float(lengths.std()), 1),
            "min": int(lengths.min()),
            "max": int(lengths.max()),
        },
    }


def train(task: str, target_return: float, settings: Settings, work_dir: Path) -> Path:
    """Trains until an evaluated return reaches `target_return` (or to `max_updates`).

    Returns the file of the actor whose evaluation came nearest to the target: early in training returns jump, and the
    first that reaches a medium return may be far above it. Every evaluated actor is kept in `work_dir`, and in
    `replay.npz` all episodes up to the first evaluation of medium return.
    """
    require_writable(work_dir / "training.json")
    envs = make_envs(task, settings.n_envs, settings.seed)
    eval_envs = make_envs(task, settings.n_eval_envs, settings.seed + 10_000)
    policy = make_policy(envs.obs_spec["state"][0], envs.action_dim, settings)
    rng = NoiseSource(settings.seed + 1)
    sampler = Sampler(policy, rng, envs.action_dim)
    collector = Collector(envs, sampler, settings)
    buffers = Buffers(collector.buffer)
    learner = Learner(policy, sac_settings(settings, envs.action_dim), buffers)
    start, updates, log = time.monotonic(), 0, []
    while updates < settings.max_updates:
        collector.collect(settings.updates_per_call / settings.replay_ratio)
        collector.buffer.flush()
        rows = Rows(buffers, rng, settings.n_envs)
        losses = learner.run(Phase(settings.updates_per_call), rng, rows, lambda count, losses: None)
        updates += settings.updates_per_call
        if updates % settings.eval_every >= settings.updates_per_call:
            continue
        evaluation = statistics(roll_out(sampler, eval_envs, lambda episodes, _: episodes >= 1))
        row = {"updates": updates, "env_steps": collector.env_steps, **evaluation}
        row |= {k.partition(".")[0]: float(v.mean()) for k, v in losses.items()}
        row["alpha"] = float(np.exp(policy.watched()["log_alpha"]))
        log.append(row)
        save_actor(actor_file(work_dir, updates), policy)
        with atomic_file(work_dir / "training.json") as file:
            file.write(json.dumps(log, indent=1).encode())
        print(_progress_line(row, updates / (time.monotonic() - start), settings), flush=True)
        whole = collector.env_steps <= settings.buffer_size
        if evaluation["return"]["mean"] >= MEDIUM_RETURN[task] and whole and not replay_file(work_dir).exists():
            write_npz(replay_file(work_dir), collector.episodes().arrays())
        if evaluation["return"]["mean"] >= target_return:
            break
    nearest = min(log, key=lambda row: abs(row["return"]["mean"] - target_return))
    return actor_file(work_dir, nearest["updates"])


def actor_file(work_dir: Path, updates: int) -> Path:
    """Returns where `train` keeps the actor evaluated after that many gradient steps."""
    return work_dir / f"actor_{updates:07d}.npz"


def replay_file(work_dir: Path) -> Path:
    """Returns where `train` keeps what was collected up to a medium return, in the environment's units."""
    return work_dir / "replay.npz"


class Collector:
    """Steps the environments and fills the replay buffer."""

    def __init__(self, envs: LocomotionVectorEnv, sampler: Sampler, settings: Settings):
        self.envs, self.sampler, self.settings = envs, sampler, settings
        obs_dim, action_dim = envs.obs_spec["state"][0], envs.action_dim
        names = ("obs", "actions", "next_obs", "rewards", "terminated")
        self.buffer = ReplayBuffer(settings.buffer_size, fields(names, (1, obs_dim), (1, action_dim)))
        self.obs = envs.reset()["state"]
        self.env_steps, self._owed = 0, float(settings.explore_steps)
        self._ended: list[np.ndarray] = []  # of each step, [E]

    def collect(self, steps: float) -> None:
        """Executes `steps` environment steps (fractions are carried over), at first also the exploration steps."""
        self._owed += steps
        while self._owed > 0:
            if self.env_steps < self.settings.explore_steps:
                actions = self.sampler.rng.uniform((self.envs.n_envs, 1, self.envs.action_dim), -1.0, 1.0)
            else:
                actions = self.sampler(self.obs)
            result = self.envs.step(actions)
            following = result.observations["state"].copy()
            ended = result.terminated | result.truncated
            following[ended] = result.infos["final_observations"]["state"][ended]
            self.buffer.add(
                obs=self.obs,
                next_obs=following,
                actions=actions,
                rewards=result.rewards,
                terminated=result.terminated,
            )
            self.obs = result.observations["state"]
            self._ended.append(ended)
            self.env_steps += self.envs.n_envs
            self._owed -= self.envs.n_envs

    def episodes(self) -> Episodes:
        """Returns the complete episodes in the buffer, environment by environment; it must not have overflowed."""
        rows, ended = self.buffer.tensors(), np.stack(self._ended)  # [steps,E]
        kept = np.cumsum(ended[::-1], axis=0)[::-1] > 0  # not after the last end of an environment

        def column(field: np.ndarray) -> np.ndarray:
            """Orders a field [steps*E,…] environment by environment."""
            by_step = field.reshape(*ended.shape, *field.shape[1:])
            return np.swapaxes(by_step, 0, 1)[kept.T]

        ends = np.flatnonzero(column(ended.reshape(-1))) + 1
        return Episodes(
            states=column(rows["obs"][:, 0]),
            actions=column(rows["actions"][:, 0]),
            traj_lengths=np.diff(np.concatenate([[0], ends])),
            rewards=column(rows["rewards"]),
            terminals=column(rows["terminated"]).astype(bool),
        )


def thinned(episodes: Episodes, transitions: int) -> Episodes:
    """Takes every n-th episode, so that about that many transitions remain."""
    return episodes.select(np.arange(0, len(episodes.traj_lengths), max(round(len(episodes.states) / transitions), 1)))


def joined(first: Episodes, second: Episodes) -> Episodes:
    """Joins the episodes of both."""
    other = second.arrays()
    return Episodes(**{name: np.concatenate([array, other[name]]) for name, array in first.arrays().items()})


def sac_settings(settings: Settings, action_dim: int) -> dict[str, Any]:
    """Returns the `train` node of SAC with one actor step for each of the critic's."""
    return {
        "gamma": 0.99,
        "actor_lr": 3e-4,
        "critic_lr": 1e-3,
        "target_ema_rate": 0.005,
        "target_entropy": -float(action_dim),
        "init_temperature": 1.0,
        "batch_size": settings.batch_size,
        "actor_steps": 1,
    }


def _progress_line(row: dict[str, Any], rate: float, settings: Settings) -> str:
    minutes = (settings.max_updates - row["updates"]) / rate / 60
    returns = row["return"]
    return (
        f"{row['updates']:7d} updates {row['env_steps']:8d} env steps | return {returns['mean']:7.1f} +- "
        f"{returns['std']:6.1f} length {row['length']['mean']:6.1f} | alpha {row['alpha']:.3f} "
        f"critic {row['loss_critic']:8.2f} | {rate:4.0f} updates/s, at most {minutes:.0f} min left"
    )


def save_actor(path: Path, policy: SAC) -> None:
    """Writes the actor's weights under the reference's names."""
    write_npz(path, state_dict(policy.network))


def round_mantissa(x: np.ndarray, bits: int = MANTISSA_BITS) -> np.ndarray:
    """Rounds float32 numbers [...] to so many mantissa bits (relative error 2^-(bits+1)): the zeros compress."""
    drop = 23 - bits
    words = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((words + np.uint32(1 << (drop - 1))) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)).view(np.float32)


def record(task: str, actor: Path, transitions: int, settings: Settings) -> Episodes:
    """Collects episodes of the stochastic policy until there are that many transitions."""
    envs = make_envs(task, 50, settings.seed + 20_000)
    policy = make_policy(envs.obs_spec["state"][0], envs.action_dim, settings)
    load_state_dict(policy.network, read_npz(actor))
    sampler = Sampler(policy, NoiseSource(settings.seed + 2), envs.action_dim)
    return roll_out(sampler, envs, lambda _, steps: steps >= transitions)


def make(
    task: str,
    flavour: str,
    transitions: int,
    settings: Settings,
    work_dir: Path,
    *,
    actor: Path | None = None,
    replay: Path | None = None,
    target_return: float | None = None,
) -> Episodes:
    """Makes data of one of D4RL's kinds, in the environment's units.

    medium, expert: episodes of such a policy. medium-replay: what a training has met until it was of medium return.
    medium-expert: the medium data that are there, and as many transitions of an expert.

    Args:
        transitions: about so many.
        work_dir: of the training.
        actor, replay: of an earlier training, instead of one.
        target_return: of the policy, where it is not to be about D4RL's.
    """
    settings.check()
    require_range("--transitions", transitions, 2)
    require_range("--target-return", 0.0 if target_return is None else target_return)
    if flavour == "medium-replay":
        if replay is None:
            train(task, MEDIUM_RETURN[task] if target_return is None else target_return, settings, work_dir)
            replay = replay_file(work_dir)
            cure = f"raise --max-updates ({settings.max_updates}) or --buffer-size ({settings.buffer_size})"
            require_file(replay, f"no {replay}: no medium return was reached before the end or a full buffer: {cure}")
        return thinned(load_episodes(replay), transitions)
    if actor is None:
        returns = MEDIUM_RETURN if flavour == "medium" else EXPERT_RETURN
        actor = train(task, returns[task] if target_return is None else target_return, settings, work_dir)
    print(f"rolling out {actor}", flush=True)
    if flavour != "medium-expert":
        return record(task, actor, transitions, settings)
    halves = load_unscaled(data_folder(f"gym/{task}-medium-v2")), record(task, actor, transitions // 2, settings)
    return joined(*(thinned(half, transitions // 2) for half in halves))


def ship(raw: Episodes, out_dir: Path) -> dict[str, Any]:
    """Writes train.npz and normalization.npz; returns statistics of the data."""
    normalization = bounds_of(raw)
    scaled = scale_episodes(raw, normalization)
    compact = replace(scaled, states=round_mantissa(scaled.states), actions=round_mantissa(scaled.actions))
    train_file, *_ = save_episodes(out_dir, {"train": compact}, normalization)
    size = train_file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{train_file} has {size} bytes, more than {MAX_FILE_BYTES}: ask for fewer --transitions")
    return statistics(raw) | {"bytes": size}
