"""A built-in task for several agents: each moves in a square to a goal of its own and must not touch the others.

  observation [O = 4 + 2 (N - 1)] of an agent: its position, the way to its goal, the ways to the other agents
  action [2] of an agent: its velocity, cut to [-1, 1]; discrete: one of stay, right, left, up, down, one-hot [5]
  step: position + 0.1 velocity, within the square [-1, 1]^2
  reward, shared: minus the mean distance to the goals, minus 0.5 for each pair closer than 0.15
  episode: 25 steps, whose end is a truncation; start and goals are uniform in the square

Everything is drawn from the environment's seed and the number of the episode, so the state is a few arrays. Shape
letters: E environments, Ta actions of a chunk, To history, N agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.envs.batched import BatchedVectorEnv
from diffusion_rl.envs.chunks import ChunkOutcome, StepOutcomes

EPISODE_STEPS, STEP, TOUCHING, PENALTY = 25, 0.1, 0.15, 0.5
MOVES = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], np.float64)
EPISODES_OF_A_SEED = 1_000_003  # seeds further apart than this many episodes share none


class ToyAgentsVectorEnv(BatchedVectorEnv):
    """E environments of N agents side by side; episodes that end are followed by the next ones.

    Args:
        discrete: actions are one-hot moves [5] instead of velocities [2].
        seeds: of the environments [E]; 0 … E-1 by default.
        chunks: `act_steps` and `n_obs_steps` of `BatchedVectorEnv`.
    """

    def __init__(
        self,
        n_envs: int,
        n_agents: int = 2,
        *,
        discrete: bool = False,
        max_episode_steps: int | None = EPISODE_STEPS,
        seeds: Sequence[int] | None = None,
        **chunks: Any,
    ):
        if n_agents < 1:
            raise UserError(f"n_agents {n_agents}: at least one agent is needed")
        self.n_agents, self.discrete, self.obs_dim = n_agents, discrete, 4 + 2 * (n_agents - 1)
        super().__init__(
            "toy",
            n_envs,
            n_agents * self.obs_dim,
            n_agents * (len(MOVES) if discrete else 2),
            max_episode_steps=max_episode_steps,
            reset_within_step=True,
            full_observations=True,
            **chunks,
        )
        self._positions = np.zeros((n_envs, n_agents, 2))
        self._goals = np.zeros((n_envs, n_agents, 2))
        self._seeds, self._episodes = np.zeros(n_envs, np.int64), np.zeros(n_envs, np.int64)
        self.seed(range(n_envs) if seeds is None else seeds)

    def _reseed(self, row: int, seed: int) -> None:
        self._seeds[row], self._episodes[row] = seed, 0

    def _simulate(self, rows: np.ndarray, actions: np.ndarray) -> ChunkOutcome:
        by_agent = np.asarray(actions, np.float64).reshape(*actions.shape[:2], self.n_agents, -1)
        velocities = np.clip(self._velocities(by_agent), -1, 1)
        positions, now = np.empty_like(velocities), self._positions[rows]
        for t in range(actions.shape[1]):
            positions[:, t] = now = np.clip(now + STEP * velocities[:, t], -1, 1)
        goals = self._goals[rows]
        steps = StepOutcomes.unending(self._observe(positions, goals), self._rewards(positions, goals))
        outcome = self._history.advance(rows, steps)
        self._positions[rows] = positions[np.arange(len(rows)), outcome.executed - 1]
        return outcome

    def _velocities(self, actions: np.ndarray) -> np.ndarray:
        return MOVES[actions.argmax(axis=-1)] if self.discrete else actions

    def _rewards(self, positions: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Returns rewards [E,Ta] for positions [E,Ta,N,2] and goals [E,N,2]."""
        distance = np.linalg.norm(goals[:, None] - positions, axis=-1).mean(axis=-1)
        apart = np.linalg.norm(positions[..., :, None, :] - positions[..., None, :, :], axis=-1)
        pairs = np.triu(np.ones((self.n_agents, self.n_agents), bool), 1)
        return -distance - PENALTY * (apart[..., pairs] < TOUCHING).sum(axis=-1)

    def _observe(self, positions: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Returns observations [E,Ta,N*O] for positions [E,Ta,N,2] and goals [E,N,2]."""
        others = [np.delete(positions, i, axis=-2) - positions[..., i : i + 1, :] for i in range(self.n_agents)]
        ways = np.stack([x.reshape(*x.shape[:-2], -1) for x in others], axis=-2)
        rows = np.concatenate([positions, goals[:, None] - positions, ways], axis=-1)
        return rows.reshape(*rows.shape[:-2], -1)

    def _first_observations(self, rows: np.ndarray) -> np.ndarray:
        for row in rows:
            rng = NoiseSource(int(self._seeds[row]) * EPISODES_OF_A_SEED + int(self._episodes[row]))
            self._positions[row], self._goals[row] = rng.uniform((2, self.n_agents, 2), -1, 1, np.float64)
        self._episodes[rows] += 1
        return self._observe(self._positions[rows, None], self._goals[rows])[:, 0]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"positions": self._positions, "goals": self._goals, "seeds": self._seeds, "episodes": self._episodes}


def controller(observations: np.ndarray, noise: np.ndarray, speed: float, turn: float, discrete: bool) -> np.ndarray:
    """Drives agents towards their goals with at most `speed`, off their way by `turn` radians, with noise.

    Args:
        observations: [E,N,O];  noise: [E,N,2], added to the velocity.

    Returns:
        actions [E,N,A].
    """
    way = observations[..., 2:4]
    distance = np.linalg.norm(way, axis=-1, keepdims=True)
    straight = way / np.maximum(distance, 1e-6) * np.minimum(speed, distance / STEP)
    c, s = np.cos(turn), np.sin(turn)
    velocity = straight @ np.array([[c, s], [-s, c]]) + noise
    if not discrete:
        return np.clip(velocity, -1, 1)
    nearest = np.linalg.norm(velocity[..., None, :] - MOVES, axis=-1).argmin(axis=-1)
    return np.eye(len(MOVES))[nearest]
