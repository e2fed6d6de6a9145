"""Collecting trajectories from a vector environment, and what episodes they contain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError

Observations = dict[str, np.ndarray]


@dataclass
class Rollout:
    """S steps of E environments; a step is one action chunk."""

    observations: Observations  # each [S,E,To,...], what was acted on
    last_observations: Observations  # each [E,To,...], after the last step
    rewards: np.ndarray  # [S,E], summed over the chunk
    terminated: np.ndarray  # [S,E]
    firsts: np.ndarray  # [S+1,E], 1 where an episode begins
    decisions: dict[str, np.ndarray] = field(default_factory=dict)  # what the policy said, each [S,E,...]

    def first(self, n: int) -> Rollout:
        """Its first n steps; the observations after them are not known."""
        return Rollout(
            observations={k: v[:n] for k, v in self.observations.items()},
            last_observations={},
            rewards=self.rewards[:n],
            terminated=self.terminated[:n],
            firsts=self.firsts[: n + 1],
            decisions={k: v[:n] for k, v in self.decisions.items()},
        )

    def episodes(self) -> list[tuple[int, int, int]]:
        """(environment, first step, step after the last) of the episodes that began and ended in it.

        Episodes of a single chunk are not counted, as in the reference.
        """
        found = []
        for env in range(self.rewards.shape[1]):
            starts = np.flatnonzero(self.firsts[:, env] == 1)
            found += [(env, a, b) for a, b in zip(starts[:-1], starts[1:], strict=True) if b - a > 1]
        return found


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
    """Run the policy for `n_steps` chunks in all environments, or until `n_episodes` have ended if that is sooner.

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
    n_envs = len(firsts)
    rollout = Rollout(
        observations={k: np.empty((n_steps, *v.shape), v.dtype) for k, v in observations.items()},
        last_observations=observations,
        rewards=np.zeros((n_steps, n_envs)),
        terminated=np.zeros((n_steps, n_envs)),
        firsts=np.zeros((n_steps + 1, n_envs)),
    )
    rollout.firsts[0] = firsts
    ended = 0
    for step in range(n_steps):
        actions, keep = decide(observations)
        if not np.isfinite(actions).all():
            raise UserError(
                "the policy's actions are not finite: its weights have diverged; lower train.actor_lr, or take an "
                "earlier checkpoint"
            )
        for key, value in observations.items():
            rollout.observations[key][step] = value
        for key, value in keep.items():
            if step == 0:
                rollout.decisions[key] = np.empty((n_steps, *value.shape), value.dtype)
            rollout.decisions[key][step] = value
        result = venv.step(actions[:, :act_steps])
        store(observations, actions[:, :act_steps], result)
        observations = result.observations
        rollout.rewards[step] = result.rewards
        rollout.terminated[step] = result.terminated
        rollout.firsts[step + 1] = result.terminated | result.truncated
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
    success_rate: float  # share of episodes whose best reward reaches the threshold
    returns: np.ndarray  # [n_episodes]


class RunningEpisodes:
    """Episodes across rollouts that are shorter than they; those of a single chunk are not counted here either."""

    def __init__(self, n_envs: int):
        self.running = np.zeros((n_envs, 3))  # sum of rewards, largest reward, chunks; of episodes under way
        self.whole = np.zeros(n_envs, bool)  # whether their beginnings were seen
        self.ended = np.zeros((0, 2))  # sum and largest reward of those that ended since the last `clear`

    def add(self, rollout: Rollout) -> None:
        """Go on with a rollout that begins where the last one ended."""
        for rewards, first, ended in zip(rollout.rewards, rollout.firsts, rollout.firsts[1:] == 1, strict=False):
            self.running[first == 1] = (0, -np.inf, 0)
            self.whole |= first == 1
            self.running[:, 0] += rewards
            self.running[:, 1] = np.maximum(self.running[:, 1], rewards)
            self.running[:, 2] += 1
            counted = ended & self.whole & (self.running[:, 2] > 1)
            self.ended = np.concatenate([self.ended, self.running[counted, :2]])

    def interrupt(self) -> None:
        """The environments have been used otherwise: what is under way in them was not seen from its beginning."""
        self.whole[:] = False

    def clear(self) -> None:
        """Forget what has ended."""
        self.ended = self.ended[:0]

    def statistics(self, act_steps: int, threshold: float) -> EpisodeStatistics:
        """Of the episodes that have ended since the last `clear`."""
        return _summary(self.ended[:, 0], self.ended[:, 1] / act_steps, threshold)

    def state(self) -> dict[str, np.ndarray]:
        """As arrays."""
        return {"running": self.running.copy(), "whole": self.whole.copy(), "ended": self.ended.copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`."""
        self.running, self.whole, self.ended = (state[name].copy() for name in ("running", "whole", "ended"))


def episode_statistics(rollout: Rollout, act_steps: int, threshold: float) -> EpisodeStatistics:
    """Summarise the whole episodes of a rollout."""
    episodes = [rollout.rewards[start:end, env] for env, start, end in rollout.episodes()]
    return _summary([np.sum(e) for e in episodes], [np.max(e) / act_steps for e in episodes], threshold)


def _summary(returns: Sequence[float], best: Sequence[float], threshold: float) -> EpisodeStatistics:
    """From each episode's sum of rewards and its best reward per environment step."""
    if not len(returns):
        return EpisodeStatistics(0, 0.0, 0.0, 0.0, np.array([]))
    return EpisodeStatistics(
        n_episodes=len(returns),
        mean_return=float(np.mean(returns)),
        mean_best_reward=float(np.mean(best)),
        success_rate=float(np.mean(np.array(best) >= threshold)),
        returns=np.array(returns),
    )
