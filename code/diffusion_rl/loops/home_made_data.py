"""Home-made data of medium quality for the locomotion tasks: train SAC up to a given return, roll it out, write npz.

D4RL's files cannot be shipped with this repository; `data/gym/README.md` says what was made instead and how it differs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import tensorflow as tf

from diffusion_rl.algorithms.sac import SAC, Batch
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.data.replay import ReplayBuffer
from diffusion_rl.networks.gaussian import DoubleQ, GaussianHead


@dataclass(frozen=True)
class Task:
    """gymnasium's name, and about the return of D4RL's medium policy."""

    env_id: str
    medium_return: float


TASKS = {
    "hopper": Task("Hopper-v4", 1400.0),
    "walker2d": Task("Walker2d-v4", 2800.0),
    "halfcheetah": Task("HalfCheetah-v4", 4700.0),
}


class Environments:
    """E independent gymnasium environments in one process; an episode that ends is reset inside the step."""

    def __init__(self, env_id: str, n_envs: int, seed: int, bodies: dict[str, Any] | None):
        self.envs = [gymnasium.make(env_id) for _ in range(n_envs)]
        for env in self.envs:
            if bodies is not None:
                restore_bodies(env.unwrapped, bodies)
        self.seed = seed

    def reset(self) -> np.ndarray:
        """Observations [E,O] float64 after seeding environment i with seed + i."""
        return np.stack([env.reset(seed=self.seed + i)[0] for i, env in enumerate(self.envs)])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """actions [E,A] -> obs [E,O] (after any reset), next_obs [E,O] (before it), rewards, terminated, truncated [E]."""
        results = [env.step(a) for env, a in zip(self.envs, actions, strict=True)]
        next_obs = np.stack([r[0] for r in results])
        rewards, terminated, truncated = (np.array([r[k] for r in results]) for k in (1, 2, 3))
        obs = next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            obs[i] = self.envs[i].reset()[0]
        return obs, next_obs, rewards, terminated, truncated


def restore_bodies(env: Any, bodies: dict[str, Any]) -> None:
    """Give the model the body masses of MuJoCo 2.1.0, which D4RL's environments had."""
    model = env.model
    for key in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, key)[:] = np.asarray(bodies[key]).reshape(getattr(model, key).shape)
    mujoco.mj_setConst(model, mujoco.MjData(model))


def build_agent(obs_dim: int, action_dim: int, seed: int) -> SAC:
    """SAC with 256x256 networks and the reference's hyper-parameters."""
    with initial_weights(NoiseSource(seed)):
        actor = GaussianHead(obs_dim, action_dim, 1, [256, 256], std_min=0.0067, std_max=7.3891)
        critic, target = (DoubleQ(obs_dim, action_dim, 1, [256, 256]) for _ in range(2))
    return SAC(actor, critic, target, action_dim=action_dim, target_entropy=-float(action_dim))


def rollout(
    agent: SAC, envs: Environments, noise: NoiseSource, enough: Callable[[list], bool]
) -> list[dict[str, np.ndarray]]:
    """Whole episodes of the stochastic policy, in the order in which they end.

    Every environment is reset first. To keep short episodes from being over-represented, the episodes that run when
    `enough` becomes true are finished and kept too.
    """
    n, action_dim = len(envs.envs), agent.action_dim
    obs, running = envs.reset(), np.ones(n, bool)
    open_episodes: list[list[tuple]] = [[] for _ in range(n)]
    episodes: list[dict[str, np.ndarray]] = []
    while running.any():
        eps = noise.normal((n, action_dim))
        actions = agent.act(tf.constant(obs[:, None], tf.float32), eps).numpy()[:, 0]
        before = obs
        obs, _, rewards, terminated, truncated = envs.step(actions)
        for i in np.flatnonzero(running):
            open_episodes[i].append((before[i], actions[i], rewards[i], terminated[i]))
            if terminated[i] or truncated[i]:
                columns = zip(*open_episodes[i], strict=True)
                names = ("states", "actions", "rewards", "terminals")
                episodes.append({k: np.asarray(v) for k, v in zip(names, columns, strict=True)})
                open_episodes[i] = []
                running[i] = not enough(episodes)
    return episodes


def train(task: Task, agent: SAC, envs: Environments, eval_envs: Environments, seed: int, out: Path, args: Any) -> Path:
    """Train until the evaluated return reaches the medium level; returns the actor's file."""
    noise = NoiseSource(seed + 1)
    obs = envs.reset()
    action_dim, n_envs = agent.action_dim, len(obs)
    buffer = ReplayBuffer(args.buffer_size, (1, obs.shape[1]), (1, action_dim))
    updates, env_steps, start, log = 0, 0, time.time(), []
    next_eval = args.eval_every
    debt = 0.0
    losses = (np.nan, np.nan)
    while updates < args.max_updates:
        if env_steps < args.explore_steps:
            actions = noise.uniform((n_envs, action_dim), -1.0, 1.0)
        else:
            eps = noise.normal((n_envs, action_dim))
            actions = agent.act(tf.constant(obs[:, None], tf.float32), eps).numpy()[:, 0]
        before = obs
        obs, next_obs, rewards, terminated, _ = envs.step(actions)
        buffer.add(before[:, None], next_obs[:, None], actions[:, None], rewards, terminated)
        env_steps += n_envs
        if env_steps < args.explore_steps:
            continue
        debt += n_envs * args.replay_ratio
        if debt < args.scan:
            continue
        debt -= args.scan
        indices = noise.integers(0, buffer.size, (args.scan, args.batch_size))
        draws = noise.normal((args.scan, 3, args.batch_size, action_dim))
        losses = agent.update(Batch(*(tf.constant(x) for x in buffer.gather(indices))), tf.constant(draws))
        updates += args.scan
        if updates < next_eval:
            continue
        next_eval += args.eval_every
        episodes = rollout(agent, eval_envs, noise, lambda e: len(e) >= 1)
        returns = np.array([e["rewards"].sum() for e in episodes])
        rate = updates / (time.time() - start)
        row = {
            "updates": updates,
            "env_steps": env_steps,
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std()),
            "length_mean": float(np.mean([len(e["rewards"]) for e in episodes])),
            "alpha": float(np.exp(agent.log_alpha.numpy())),
            "critic_loss": float(losses[0]),
            "updates_per_s": rate,
        }
        log.append(row)
        left = (args.max_updates - updates) / rate / 60
        print(
            f"{updates:7d} updates {env_steps:8d} env steps | return {row['return_mean']:7.1f} +- {row['return_std']:6.1f}"
            f" length {row['length_mean']:6.1f} | alpha {row['alpha']:.3f} critic {row['critic_loss']:8.2f}"
            f" | {rate:5.0f} updates/s, at most {left:.0f} min left",
            flush=True,
        )
        path = save_actor(out / f"actor_{updates:07d}.npz", agent, row)
        (out / "training.json").write_text(json.dumps(log, indent=1))
        if row["return_mean"] >= task.medium_return:
            return path
    return path


def save_actor(path: Path, agent: SAC, row: dict[str, Any]) -> Path:
    arrays = {f"w{i}": v.numpy() for i, v in enumerate(agent.actor.trainable_variables)}
    np.savez(path, meta=json.dumps(row), **arrays)
    return path


def load_actor(path: Path, agent: SAC) -> None:
    with np.load(path, allow_pickle=False) as z:
        for i, v in enumerate(agent.actor.trainable_variables):
            v.assign(z[f"w{i}"])
