"""Environments as the policies of VAE + Diffusion RL see them: the recent past of every agent, normalised.

Shape letters: E environments, N agents, O observation and A action of one, hh rows of history, Ta actions of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_rl.data.agent_windows import AgentNormalizer, agent_rows
from diffusion_rl.envs.interface import StepResult, VectorEnv


class AgentHistoryEnv:
    """A vector environment whose observation is {"state": [E,hh+1,N*(A+O)]}, in the layout of the training data
    (`data.agent_windows`), and whose actions are those that the VAE decodes.

    Args:
        venv: whose observations are [E,To,N*O]; it must tell all of a chunk (`full_observations`) and begin episodes by
            itself.
        discrete: actions are logits, of which the largest is taken; `legal_actions` [E,N*A] in the infos of the
            environment leave some out.
        use_zero_padding: zeros before an episode's first step; else its first observation.
    """

    def __init__(
        self,
        venv: VectorEnv,
        normalizer: AgentNormalizer,
        n_agents: int,
        history_horizon: int,
        discrete: bool = False,
        use_zero_padding: bool = True,
    ):
        self.venv, self.normalizer, self.n_agents, self.discrete = venv, normalizer, n_agents, discrete
        self.use_zero_padding, self.n_envs, self.act_steps = use_zero_padding, venv.n_envs, venv.act_steps
        width = n_agents * (normalizer.obs_dim + normalizer.action_dim)
        self.state = np.zeros((self.n_envs, history_horizon + 1, width), np.float32)
        self.legal: np.ndarray | None = None

    @property
    def restorable(self) -> bool:
        return bool(getattr(self.venv, "restorable", False))

    def reset(self, options: Sequence[dict[str, Any]] | None = None) -> dict[str, np.ndarray]:
        """Begins new episodes everywhere."""
        self.legal = None
        self._begin(np.arange(self.n_envs), self.venv.reset(options)["state"][:, -1])
        return {"state": self.state.copy()}

    def step(self, actions: np.ndarray) -> StepResult:
        """Executes chunks [E,Ta,N*A] of normalised actions, or of logits."""
        chosen = self.choose(actions)
        executed_as = chosen if self.discrete else self.normalizer.unnormalize_actions(chosen)
        if not self.discrete:
            chosen = self.normalizer.normalize_actions(executed_as)  # the past holds what could be done, as the data do
        result = self.venv.step(executed_as)
        executed, frames = result.infos["executed_steps"], result.infos["full_observations"]["state"]
        self.legal = result.infos.get("legal_actions")
        for t in range(actions.shape[1]):
            rows = np.flatnonzero(t < executed)
            self._advance(rows, chosen[rows, t], frames[rows, t])
        infos = {**result.infos, "final_observations": {"state": self.state.copy()}}
        ended = np.flatnonzero(result.terminated | result.truncated)
        self._begin(ended, result.observations["state"][ended, -1])
        return StepResult({"state": self.state.copy()}, result.rewards, result.terminated, result.truncated, infos)

    def choose(self, actions: np.ndarray) -> np.ndarray:
        """Returns actions [E,H,N*A] as in the data: one-hot of the largest legal logit, where they are discrete.

        What is legal is known for the first action of a chunk.
        """
        if not self.discrete:
            return actions
        logits = actions.reshape(*actions.shape[:2], self.n_agents, -1).copy()
        if self.legal is not None:
            logits[:, 0] = np.where(self.legal.reshape(logits[:, 0].shape) > 0, logits[:, 0], -np.inf)
        one_hot = np.eye(logits.shape[-1], dtype=np.float32)[logits.argmax(axis=-1)]
        return one_hot.reshape(actions.shape)

    def _begin(self, rows: np.ndarray, observations: np.ndarray) -> None:
        present = self._present(observations)
        self.state[rows] = 0 if self.use_zero_padding else present[:, None]
        self.state[rows, -1] = present

    def _advance(self, rows: np.ndarray, actions: np.ndarray, observations: np.ndarray) -> None:
        """Writes actions into the present rows; the next observations become the present."""
        past = self.state[rows]
        split = past[:, -1].reshape(len(rows), self.n_agents, past.shape[-1] // self.n_agents)
        split[..., : self.normalizer.action_dim] = actions.reshape(len(rows), self.n_agents, self.normalizer.action_dim)
        past[:, -1] = split.reshape(len(rows), past.shape[-1])
        self.state[rows] = np.concatenate([past[:, 1:], self._present(observations)[:, None]], axis=1)

    def _present(self, observations: np.ndarray) -> np.ndarray:
        """Maps [R,N*O] in the environment's units to [R,N*(A+O)] with zeros for actions."""
        normalised = self.normalizer.normalize_obs(observations)
        unknown = np.zeros((len(normalised), self.n_agents * self.normalizer.action_dim), np.float32)
        return agent_rows(unknown, normalised, self.n_agents)

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns what a run needs to go on; only where the environment is `restorable`."""
        return {"history": self.state.copy(), **{f"env.{k}": v for k, v in self.venv.get_state().items()}}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes back what `get_state` returned."""
        self.state[...] = state["history"]
        self.venv.set_state({k[4:]: v for k, v in state.items() if k.startswith("env.")})

    def close(self) -> None:
        self.venv.close()
