"""Collecting trajectories from a vector environment, and what episodes they contain."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError

Observations = dict[str, np.ndarray]
MIN_ENVS_FOR_HALVES = 8  # with fewer, a half is too small to be worth a program of its own


@dataclass
class Rollout:
    """S steps of E environments; a step is one action chunk."""

    observations: Observations  # each [S,E,To,...], what was acted on
    last_observations: Observations  # each [E,To,...], after the last step
    rewards: np.ndarray  # [S,E], summed over the chunk
    terminated: np.ndarray  # [S,E]
    firsts: np.ndarray  # [S+1,E], 1 where an episode begins
    decisions: dict[str, np.ndarray] = field(default_factory=dict)  # what the policy said, each [S,E,...]


Decide = Callable[[Observations, int, slice], tuple[np.ndarray, dict[str, np.ndarray]]]


def collect(
    venv: Any,
    decide: Decide,
    n_steps: int,
    observations: Observations,
    firsts: np.ndarray,
    act_steps: int,
    on_step: Callable[[int, np.ndarray], None] = lambda step, rewards: None,
) -> Rollout:
    """Run the policy for `n_steps` chunks in all environments.

    Environments that can be stepped in part (`venv.step_subset`) are divided in two halves: while one half is stepped
    in a thread, the policy decides for the other, so that simulator and network share the cores without waiting.

    Args:
        decide: (observations of some environments, step, which environments) -> (action chunks, arrays to keep).
        observations: the present ones;  firsts: [E], 1 where they begin an episode.
        act_steps: how many actions of a chunk are executed.
        on_step: called after every step, for progress and for stopping (it may raise).

    Raises:
        UserError: an action is NaN or infinite; no simulator sees it.
    """
    n_envs = len(firsts)
    rollout = Rollout(
        observations={k: np.empty((n_steps, *v.shape), v.dtype) for k, v in observations.items()},
        last_observations={k: np.array(v) for k, v in observations.items()},
        rewards=np.zeros((n_steps, n_envs)),
        terminated=np.zeros((n_steps, n_envs)),
        firsts=np.zeros((n_steps + 1, n_envs)),
    )
    rollout.firsts[0] = firsts
    halves = hasattr(venv, "step_subset") and n_envs >= MIN_ENVS_FOR_HALVES
    groups = [slice(0, n_envs // 2), slice(n_envs // 2, n_envs)] if halves else [slice(0, n_envs)]
    pending: list[Future | None] = [None] * len(groups)

    def receive(step: int, number: int) -> None:
        """Wait for a group's step and write it down."""
        group, future = groups[number], pending[number]
        if future is None:
            return
        result = future.result()
        for key, value in result.observations.items():
            rollout.last_observations[key][group] = value
        rollout.rewards[step, group] = result.rewards
        rollout.terminated[step, group] = result.terminated
        rollout.firsts[step + 1, group] = result.terminated | result.truncated
        pending[number] = None

    with ThreadPoolExecutor(1) as stepper:  # one thread: groups are stepped in order, never at once
        for step in range(n_steps):
            for number, group in enumerate(groups):
                receive(step - 1, number)
                seen = {k: v[group] for k, v in rollout.last_observations.items()}
                actions, keep = decide(seen, step, group)
                if not np.isfinite(actions).all():
                    raise UserError(
                        "the policy's actions are not finite: its weights have diverged; lower train.actor_lr, or take "
                        "an earlier checkpoint"
                    )
                for key, value in seen.items():
                    rollout.observations[key][step, group] = value
                for key, value in keep.items():
                    if key not in rollout.decisions:
                        rollout.decisions[key] = np.empty((n_steps, n_envs, *value.shape[1:]), value.dtype)
                    rollout.decisions[key][step, group] = value
                chunk = actions[:, :act_steps]
                if halves:
                    pending[number] = stepper.submit(venv.step_subset, np.arange(n_envs)[group], chunk)
                else:
                    pending[number] = stepper.submit(venv.step, chunk)
            if step > 0:
                on_step(step - 1, rollout.rewards[step - 1])
        for number in range(len(groups)):
            receive(n_steps - 1, number)
    on_step(n_steps - 1, rollout.rewards[n_steps - 1])
    return rollout


class StepNoise:
    """The noise of a step's decision for all environments, drawn once and handed out by group."""

    def __init__(self, noise: Any, shape: tuple[int, ...], dtype: str):
        self._noise, self._shape, self._dtype = noise, shape, dtype
        self._step, self._draws = -1, np.empty(0)

    def __call__(self, step: int, group: slice) -> np.ndarray:
        """[steps + 1, environments of the group, H, A]"""
        if step != self._step:
            self._step, self._draws = step, self._noise.normal(self._shape, self._dtype)
        return self._draws[:, group]


@dataclass(frozen=True)
class EpisodeStatistics:
    """Over the episodes that began and ended within a rollout."""

    n_episodes: int
    mean_return: float  # mean sum of rewards
    mean_best_reward: float  # mean over episodes of the largest reward of a chunk, per environment step
    success_rate: float  # share of episodes whose best reward reaches the threshold
    returns: np.ndarray  # [n_episodes]


def episode_statistics(
    rewards: np.ndarray, firsts: np.ndarray, act_steps: int, threshold: float
) -> EpisodeStatistics:
    """Find whole episodes in rewards [S,E] by the marks firsts [S+1,E] and summarise them.

    Episodes of a single chunk are not counted, as in the reference.
    """
    returns, best = [], []
    for env in range(rewards.shape[1]):
        starts = np.flatnonzero(firsts[:, env] == 1)
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            if end - start > 1:
                episode = rewards[start:end, env]
                returns.append(np.sum(episode))
                best.append(np.max(episode) / act_steps)
    if not returns:
        return EpisodeStatistics(0, 0.0, 0.0, 0.0, np.array([]))
    return EpisodeStatistics(
        n_episodes=len(returns),
        mean_return=float(np.mean(returns)),
        mean_best_reward=float(np.mean(best)),
        success_rate=float(np.mean(np.array(best) >= threshold)),
        returns=np.array(returns),
    )
