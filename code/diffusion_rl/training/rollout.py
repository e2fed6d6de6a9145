"""Collecting trajectories from a vector environment, and what episodes they contain."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffusion_rl.config.instantiate import set_by_user
from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.interface import Observations, StepResult
from diffusion_rl.tasks.registry import task_named

log = logging.getLogger(__name__)

Floats = Sequence[float] | np.ndarray

THRESHOLD = "best_reward_threshold_for_success"


@dataclass
class Rollout:
    """S steps of E environments; a step is one action chunk."""

    observations: Observations  # each [S,E,To,...], what was acted on
    last_observations: Observations  # each [E,To,...], after the last step
    rewards: np.ndarray  # [S,E], summed over the chunk
    terminated: np.ndarray  # [S,E]
    firsts: np.ndarray  # [S+1,E], 1 where an episode begins
    decisions: dict[str, np.ndarray] = field(default_factory=dict)  # what the policy said, each [S,E,...]
    successes: np.ndarray | None = None  # [S,E] bool, where environments say whether a chunk reached the goal

    @classmethod
    def beginning(cls, n_steps: int, observations: Observations, firsts: np.ndarray) -> Rollout:
        """Returns room for `n_steps` after these observations [E,To,...]; firsts [E], 1 where an episode begins."""
        shape = n_steps, len(firsts)
        room = {k: np.empty((n_steps, *v.shape), v.dtype) for k, v in observations.items()}
        rollout = cls(room, observations, np.zeros(shape), np.zeros(shape), np.zeros((n_steps + 1, len(firsts))))
        rollout.firsts[0] = firsts
        return rollout

    def decided(self, step: int, observations: Observations, decisions: Mapping[str, np.ndarray]) -> None:
        """Writes what was acted on in a step [E,To,...], and what the policy decided [E,...]."""
        for key, value in observations.items():
            self.observations[key][step] = value
        for key, value in decisions.items():
            if step == 0:
                self.decisions[key] = np.empty((len(self.rewards), *value.shape), value.dtype)
            self.decisions[key][step] = value

    def answered(self, step: int, result: StepResult) -> None:
        """Writes what the environments answered in a step."""
        self.rewards[step], self.terminated[step] = result.rewards, result.terminated
        self.firsts[step + 1] = result.terminated | result.truncated
        if "success" in result.infos:
            if self.successes is None:
                self.successes = np.zeros(self.rewards.shape, bool)
            self.successes[step] = result.infos["success"]

    def first(self, n: int) -> Rollout:
        """Returns its first n steps; the observations after them are not known."""
        return Rollout(
            observations={k: v[:n] for k, v in self.observations.items()},
            last_observations={},
            rewards=self.rewards[:n],
            terminated=self.terminated[:n],
            firsts=self.firsts[: n + 1],
            decisions={k: v[:n] for k, v in self.decisions.items()},
            successes=None if self.successes is None else self.successes[:n],
        )

    def episodes(self) -> list[tuple[int, int, int]]:
        """Returns (environment, first step, step after the last) of the episodes that began and ended in it.

        Episodes of a single chunk are not counted, as in the reference.
        """
        episodes = []
        for env in range(self.rewards.shape[1]):
            starts = np.flatnonzero(self.firsts[:, env] == 1)
            episodes += [(env, a, b) for a, b in zip(starts[:-1], starts[1:], strict=True) if b - a > 1]
        return episodes


Decide = Callable[[Observations], tuple[np.ndarray, dict[str, np.ndarray]]]
Store = Callable[[Observations, np.ndarray, Any], None]


def collect(
    venv: Any,
    decide: Decide,
    n_steps: int,
    observations: Observations,
    firsts: np.ndarray,
    act_steps: int,
    on_step: Callable[[int, np.ndarray], None] = lambda step, rewards: None,
    store: Store = lambda observations, actions, result: None,
    n_episodes: int | None = None,
) -> Rollout:
    """Runs the policy for `n_steps` chunks in all environments, or until `n_episodes` have ended if that is sooner.

    (Stepping one half of the environments while the policy decides for the other was tried: slower, 20 ms a step
    against 14 on two cores, because both already use all cores.)

    Args:
        decide: observations -> (action chunks [E,H,A], arrays [E,...] to keep).
        observations: the present ones;  firsts: [E], 1 where they begin an episode.
        act_steps: how many actions of a chunk are executed.
        on_step: called after every step, for progress and for stopping (it may raise).
        store: is given what was acted on, the executed chunks [E,Ta,A] and the answer of `venv`, which it may change.

    Raises:
        UserError: an action is NaN or infinite; no simulator sees it.
    """
    rollout, ended = Rollout.beginning(n_steps, observations, firsts), 0
    for step in range(n_steps):
        actions, decisions = decide(observations)
        if not np.isfinite(actions).all():
            raise UserError(
                "the policy's actions are not finite: its weights have diverged; lower train.actor_lr, or take an "
                "earlier checkpoint"
            )
        rollout.decided(step, observations, decisions)
        result = venv.step(actions[:, :act_steps])
        store(observations, actions[:, :act_steps], result)
        observations = result.observations
        rollout.answered(step, result)
        on_step(step, rollout.rewards[step])
        ended += int(rollout.firsts[step + 1].sum())
        if n_episodes is not None and ended >= n_episodes:
            rollout = rollout.first(step + 1)
            break
    rollout.last_observations = observations
    return rollout


@dataclass(frozen=True)
class EpisodeStatistics:
    """Over the episodes that began and ended within a rollout."""

    n_episodes: int
    mean_return: float  # mean sum of rewards
    mean_best_reward: float  # mean over episodes of the largest reward of a chunk, per environment step
    success_rate: float  # share of episodes whose best reward reaches the threshold, or that say they succeeded
    returns: np.ndarray  # [n_episodes]

    def measured(self) -> dict[str, float | None]:
        """Returns the numbers for the metrics: without an episode nothing was measured."""
        values = {"episode_return": self.mean_return, "best_reward": self.mean_best_reward}
        values["success_rate"] = self.success_rate
        return dict(values) if self.n_episodes else dict.fromkeys(values)


def no_episode_ended(n_steps: int, act_steps: int, key: str) -> str:
    """Returns the line about a rollout without a whole episode. key: the setting that says how long it is."""
    return (
        f"no episode of two chunks or more began and ended within {key}={n_steps} chunks of {act_steps} actions, so "
        f"returns and success rates are unknown; raise {key}"
    )


class RunningEpisodes:
    """Episodes across rollouts that are shorter than they; those of a single chunk are not counted here either."""

    def __init__(self, n_envs: int):
        self.running = np.zeros((n_envs, 3))  # sum of rewards, largest reward, chunks; of episodes under way
        self.whole = np.zeros(n_envs, bool)  # whether their beginnings were seen
        self.ended = np.zeros((0, 2))  # sum and largest reward of those that ended since the last `clear`
        self.reached: np.ndarray | None = None  # whether those under way reached the goal, where environments say so
        self.successes = np.zeros(0, bool)  # of those that ended since the last `clear`; empty where they do not

    def add(self, rollout: Rollout) -> None:
        """Goes on with a rollout that begins where the last one ended."""
        if rollout.successes is not None and self.reached is None:
            self.reached, self.successes = np.zeros(len(self.whole), bool), np.zeros(len(self.ended), bool)
        reached = np.zeros(rollout.rewards.shape, bool) if rollout.successes is None else rollout.successes
        steps = zip(rollout.rewards, reached, rollout.firsts, rollout.firsts[1:] == 1, strict=False)
        for rewards, now, first, ended in steps:
            self.running[first == 1] = (0, -np.inf, 0)
            self.whole |= first == 1
            self.running[:, 0] += rewards
            self.running[:, 1] = np.maximum(self.running[:, 1], rewards)
            self.running[:, 2] += 1
            counted = ended & self.whole & (self.running[:, 2] > 1)
            self.ended = np.concatenate([self.ended, self.running[counted, :2]])
            if self.reached is not None:
                self.reached = (self.reached & (first != 1)) | now
                self.successes = np.concatenate([self.successes, self.reached[counted]])

    def interrupt(self) -> None:
        """Notes that the environments were used otherwise: episodes under way were not seen from their beginning."""
        self.whole[:] = False

    def clear(self) -> None:
        """Forgets what has ended."""
        self.ended, self.successes = self.ended[:0], self.successes[:0]

    def statistics(self, act_steps: int, threshold: float | None) -> EpisodeStatistics:
        """Summarises the episodes that have ended since the last `clear`. threshold: see `success_threshold`."""
        return _summary(self.ended[:, 0], self.ended[:, 1] / act_steps, threshold, self.successes)

    def state(self) -> dict[str, np.ndarray]:
        """Returns the state as arrays."""
        state = {"running": self.running.copy(), "whole": self.whole.copy(), "ended": self.ended.copy()}
        if self.reached is None:
            return state
        return state | {"reached": self.reached.copy(), "successes": self.successes.copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes back what `state` returned; of other environments only the episodes that have ended."""
        self.ended = state["ended"].copy()
        same = len(state["whole"]) == len(self.whole)
        if same:
            self.running, self.whole = state["running"].copy(), state["whole"].copy()
        if "reached" in state:
            self.reached = state["reached"].copy() if same else np.zeros(len(self.whole), bool)
            self.successes = state["successes"].copy()


def success_threshold(env_cfg: Mapping[str, Any], environments_say: bool) -> float | None:
    """Returns the best reward per environment step that makes an episode a success.

    None where `environments_say` themselves which episodes succeed (`success` in their infos), unless the user has set
    env.best_reward_threshold_for_success, on the command line or in the configuration that was named.
    """
    configured = env_cfg.get(THRESHOLD)
    if not environments_say or (configured is not None and set_by_user(f"env.{THRESHOLD}")):
        return configured or 0
    if configured is not None:
        _say_unused(configured)
    return None


def knows_success(env_name: str) -> bool:
    """Returns whether success is more than a threshold that a file sets for form's sake, as in locomotion."""
    task = task_named(env_name)
    return set_by_user(f"env.{THRESHOLD}") if task is None else task.simulator != "locomotion"


@functools.cache
def _say_unused(configured: float) -> None:
    log.warning(
        "success rates are what the environments say (info['success']), not env.%s=%s of the task's file: "
        "set it on the command line to use it",
        THRESHOLD,
        configured,
    )


def episode_statistics(rollout: Rollout, act_steps: int, threshold: float | None) -> EpisodeStatistics:
    """Summarises the whole episodes of a rollout. threshold: see `success_threshold`."""
    places = rollout.episodes()
    episodes = [rollout.rewards[start:end, env] for env, start, end in places]
    reached = rollout.successes
    successes = [] if reached is None else [bool(reached[start:end, env].any()) for env, start, end in places]
    return _summary([np.sum(e) for e in episodes], [np.max(e) / act_steps for e in episodes], threshold, successes)


def _summary(
    returns: Floats, best: Floats, threshold: float | None, successes: Sequence[bool] | np.ndarray
) -> EpisodeStatistics:
    """Returns from each episode's sum of rewards, its best reward per environment step, and where there is no threshold
    whether it succeeded."""
    if not len(returns):
        return EpisodeStatistics(0, 0.0, 0.0, 0.0, np.array([]))
    return EpisodeStatistics(
        n_episodes=len(returns),
        mean_return=float(np.mean(returns)),
        mean_best_reward=float(np.mean(best)),
        success_rate=float(np.mean(successes if threshold is None else np.array(best) >= threshold)),
        returns=np.array(returns),
    )
