"""Simple spread of the multi-particle environments (Lowe et al. 2017), from the package mpe2 (extra `mpe`).

Three agents cover three landmarks and must not collide. O = 18 observations and A = 5 numbers in [0, 1] (nothing, left,
right, down, up) of each agent; 25 steps, whose end is a truncation. The reward is the mean over the agents.

Shape letters: E environments, Ta actions of a chunk, N agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.chunks import require_finite
from diffusion_rl.envs.interface import Observations, StepResult, Unrestorable

N_AGENTS = 3


class SpreadVectorEnv(Unrestorable):
    """E environments in this process behind the `VectorEnv` interface, agents side by side."""

    def __init__(self, n_envs: int, *, act_steps: int = 1, max_episode_steps: int = 25, seeds: Sequence[int]):
        try:
            from mpe2 import simple_spread_v3
        except ImportError as error:
            raise UserError(f'simple_spread needs {error.name}: pip install -e ".[mpe]"') from error
        build = simple_spread_v3.parallel_env
        self._envs = [build(N=N_AGENTS, max_cycles=max_episode_steps, continuous_actions=True) for _ in range(n_envs)]
        self.n_envs, self.act_steps = n_envs, act_steps
        first = self._envs[0]
        self.agents = list(first.possible_agents)
        obs_dim = sum(first.observation_space(agent).shape[0] for agent in self.agents)
        self.obs_spec: dict[str, tuple[int, ...]] = {"state": (obs_dim,)}
        self.action_dim = sum(first.action_space(agent).shape[0] for agent in self.agents)
        self._seeds: list[int | None] = [None] * n_envs
        self._last = np.zeros((n_envs, obs_dim))
        self._count = np.zeros(n_envs, np.int64)
        self.seed(seeds)

    def seed(self, seeds: Sequence[int]) -> None:
        self._seeds = list(seeds)

    def reset(self, options: Sequence[dict[str, Any]] | None = None) -> Observations:
        """Begins new episodes everywhere. options[i]: `seed`."""
        for row, option in enumerate(options or []):
            self._seeds[row] = option.get("seed", self._seeds[row])
        for row in range(self.n_envs):
            self._begin(row)
        return {"state": self._last[:, None].copy()}

    def step(self, actions: np.ndarray) -> StepResult:
        """Executes chunks [E,Ta,N*A]; episodes that end are followed by the next ones."""
        chunk, rows = actions.shape[1], np.arange(self.n_envs)
        frames = np.empty((self.n_envs, chunk, self._last.shape[1]))
        rewards, executed = np.zeros((self.n_envs, len(self.agents))), np.zeros(self.n_envs, np.int64)
        truncated = np.zeros(self.n_envs, bool)
        for row, env in enumerate(self._envs):
            for t in range(chunk):
                parts = np.split(np.clip(actions[row, t], 0, 1).astype(np.float32), len(self.agents))
                seen, earned, _, over, _ = env.step(dict(zip(self.agents, parts, strict=True)))
                self._last[row] = self._flat(seen)
                frames[row, t:] = self._last[row]
                rewards[row] += [earned[agent] for agent in self.agents]
                executed[row] = t + 1
                if any(over.values()):
                    truncated[row] = True
                    break
        shared = rewards.mean(axis=1)
        require_finite("simple_spread", frames, np.repeat(shared[:, None], chunk, 1), rows, executed, self._count)
        self._count += executed
        final = self._last.copy()
        for ended in np.flatnonzero(truncated):
            self._begin(int(ended))
        infos = {
            "executed_steps": executed,
            "full_observations": {"state": frames},
            "final_observations": {"state": final[:, None]},
            "agent_rewards": rewards,
        }
        nothing = np.zeros(self.n_envs, bool)
        return StepResult({"state": self._last[:, None].copy()}, shared, nothing, truncated, infos)

    def _begin(self, row: int) -> None:
        seen, _ = self._envs[row].reset(seed=self._seeds[row])
        self._seeds[row] = None  # the next episodes go on with the environment's own random stream
        self._last[row], self._count[row] = self._flat(seen), 0

    def _flat(self, seen: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([seen[agent] for agent in self.agents])

    def close(self) -> None:
        for env in self._envs:
            env.close()


def make_mpe_env(dataset: str, seeds: Sequence[int], act_steps: int, max_path_length: int) -> SpreadVectorEnv:
    """Builds the environments of `simple_spread-<quality>`. Raises UserError for other scenarios."""
    scenario = dataset.rpartition("-")[0] or dataset
    if scenario != "simple_spread":
        raise UserError(f"dataset {dataset}: of the multi-particle environments there is simple_spread-<quality>")
    return SpreadVectorEnv(len(seeds), act_steps=act_steps, max_episode_steps=max_path_length, seeds=seeds)


def scripted(observations: np.ndarray, noise: np.ndarray, push: float) -> np.ndarray:
    """Moves each agent to the landmark that the joint assignment with the least total distance gives it.

    Args:
        observations: [E,N,18] (velocity 2, position 2, ways to the landmarks 6, ways to the others 4, messages 4).
        noise: [E,N,2], added to the wanted force.
        push: force for each unit of distance, less the velocity's damping.

    Returns:
        actions [E,N,5].
    """
    from itertools import permutations

    velocity, ways = observations[..., :2], observations[..., 4:10].reshape(*observations.shape[:2], 3, 2)
    orders = np.array(list(permutations(range(N_AGENTS))))
    distances = np.linalg.norm(ways, axis=-1)  # [E,N,3]
    totals = sum(distances[:, agent, orders[:, agent]] for agent in range(N_AGENTS))
    chosen = orders[totals.argmin(axis=1)]  # [E,N]
    goal = np.take_along_axis(ways, chosen[..., None, None], axis=2)[:, :, 0]
    force = np.clip(push * (goal - 0.5 * velocity) + noise, -1, 1)
    right, up = force[..., 0], force[..., 1]
    actions = [np.zeros_like(right), np.maximum(-right, 0), np.maximum(right, 0), np.maximum(-up, 0), np.maximum(up, 0)]
    return np.stack(actions, axis=-1)
