"""The base of vector environments that keep their simulators' states as rows of arrays.

Shape letters: E environments, N of them, Ta actions of a chunk, To history, O observation, A action.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.envs.chunks import ChunkHistory, ChunkOutcome
from diffusion_rl.envs.interface import Observations, StepResult, require_one_each


class BatchedVectorEnv(abc.ABC):
    """E environments behind the `VectorEnv` interface; everything in them can be saved and restored.

    normalizer: bounds of the data set, or None for raw observations and actions. max_episode_steps: time limit, None
    for none. reset_within_step: begin the next episode in the step that ended one. full_observations: add the
    observation after each action to the infos. render: show environment 0 in a window.
    """

    restorable = True

    def __init__(
        self,
        name: str,
        n_envs: int,
        obs_dim: int,
        action_dim: int,
        *,
        act_steps: int = 1,
        n_obs_steps: int = 1,
        max_episode_steps: int | None = None,
        reset_within_step: bool = False,
        full_observations: bool = False,
        normalizer: MinMaxNormalizer | None = None,
        render: bool = False,
    ):
        self.name = name
        self.n_envs = n_envs
        self.act_steps = act_steps
        self.n_obs_steps = n_obs_steps
        self.reset_within_step = reset_within_step
        self.full_observations = full_observations
        self.normalizer = normalizer
        self.obs_spec: dict[str, tuple[int, ...]] = {"state": (obs_dim,)}
        self.action_dim = action_dim
        self._history = ChunkHistory(n_envs, n_obs_steps, obs_dim, max_episode_steps, name)
        self._started = np.zeros(n_envs, dtype=bool)
        self._recorders: dict[int, Any] = {}
        self._viewer: Any = None
        if render:
            from diffusion_rl.envs.video import StateViewer  # rendering libraries load only when asked for

            self._viewer = StateViewer(*self.scene()[:2])

    def seed(self, seeds: Sequence[int]) -> None:
        """Seeds environment i with seeds[i]; it takes effect with the next reset."""
        require_one_each("seeds", seeds, self.n_envs)
        for row, seed in enumerate(seeds):
            self._reseed(row, seed)

    @abc.abstractmethod
    def _first_observations(self, rows: np.ndarray) -> np.ndarray:
        """Puts these environments at the start of an episode and returns their first observations [N,O], normalised."""

    @abc.abstractmethod
    def _simulate(self, rows: np.ndarray, actions: np.ndarray) -> ChunkOutcome:
        """Executes chunks [N, Ta, A] of raw actions in these environments."""

    @abc.abstractmethod
    def _arrays(self) -> dict[str, np.ndarray]:
        """Returns the simulator's state by name, a row for each environment, not copied."""

    def _all_arrays(self) -> dict[str, np.ndarray]:
        return self._arrays() | {"chunk_steps": self._history.count, "history": self._history.frames}

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns the complete state as numeric arrays; a run that restores it continues bit for bit."""
        return {name: array.copy() for name, array in self._all_arrays().items()}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        """Takes over a state that has the names and shapes of `get_state`."""
        for name, array in self._all_arrays().items():
            array[...] = state[name]
        self._started[:] = True

    def scene(self) -> tuple[Callable[[], Any], dict[str, Any], int]:
        """Returns what videos and the window show: a function that makes the MuJoCo model, attributes of the camera,
        and frames a second.

        Raises:
            UserError: there is nothing to see in this environment.
        """
        raise UserError(f"{self.name}: there is nothing to see in it, leave videos and windows out")

    def recorder(self, path: str) -> Any:
        """Returns an object that films the states given to its `add` until its `close`."""
        from diffusion_rl.envs.video import StateRecorder  # rendering libraries load only when asked for

        load, camera, fps = self.scene()
        return StateRecorder(load, camera, path, fps)

    def _watch(self, rows: np.ndarray, executed: np.ndarray, states: Callable[[int], np.ndarray]) -> None:
        """Sends videos and window the executed part of states(i) [Ta,1+nq+nv], those of environment rows[i]."""
        for row, watcher in [*self._recorders.items(), *([] if self._viewer is None else [(0, self._viewer)])]:
            for i in np.flatnonzero(rows == row):
                for state in states(int(i))[: executed[i]]:
                    watcher.add(state)

    def reset(self, options: Sequence[dict[str, Any]] | None = None) -> Observations:
        """Begins new episodes everywhere and returns their observations {"state": [E,To,O]}.

        Args:
            options: of environment i: `seed` (seeds it anew), `video_path` (films it until its next reset).
        """
        options = [{}] * self.n_envs if options is None else options
        require_one_each("options", options, self.n_envs)
        for row, option in enumerate(options):
            if option.get("seed") is not None:
                self._reseed(row, option["seed"])
        self._begin(np.arange(self.n_envs))
        for row, option in enumerate(options):
            if option.get("video_path"):
                self._recorders[row] = self.recorder(option["video_path"])
        return {"state": self._history.frames.copy()}

    def _reseed(self, row: int, seed: int) -> None:  # noqa: B027 - not abstract: nothing may be random
        """Seeds one environment."""

    def step(self, actions: np.ndarray) -> StepResult:
        """Executes chunks [E, Ta, A] of normalised actions."""
        return self.step_subset(np.arange(self.n_envs), actions)

    def step_subset(self, indices: np.ndarray, actions: np.ndarray) -> StepResult:
        """Executes chunks [N, Ta, A] in the environments `indices` [N] only; the result has N rows."""
        actions = np.asarray(actions)
        if actions.ndim != 3 or actions.shape[0] != len(indices) or actions.shape[2] != self.action_dim:
            raise ValueError(f"actions have shape {actions.shape}, expected ({len(indices)}, Ta, {self.action_dim})")
        if not self._started[indices].all():
            raise RuntimeError("step before the first reset")
        raw = actions if self.normalizer is None else self.normalizer.unnormalize_action(actions)
        outcome = self._simulate(indices, raw)
        infos: dict[str, Any] = {"executed_steps": outcome.executed}
        if self.full_observations:
            infos["full_observations"] = {"state": outcome.frames}
        observations = outcome.observations
        if self.reset_within_step:
            infos["final_observations"] = {"state": outcome.observations}
            ended = np.asarray(indices)[outcome.terminated | outcome.truncated]
            if len(ended):
                self._begin(ended)
                observations = self._history.frames[indices]
        return StepResult(
            {"state": observations}, outcome.rewards.astype(np.float64), outcome.terminated, outcome.truncated, infos
        )

    def _begin(self, rows: np.ndarray) -> None:
        for row in rows:
            self._stop_video(int(row))
        self._history.start(rows, self._first_observations(rows))
        self._started[rows] = True

    def _normalize(self, observations: np.ndarray) -> np.ndarray:
        return observations if self.normalizer is None else self.normalizer.normalize_obs(observations)

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continues where `get_state` was taken; a video being recorded ends.

        Raises:
            UserError: the state is that of other environments.
        """
        for key, array in self.get_state().items():
            if key not in state or np.shape(state[key]) != array.shape:
                saved = f"shape {np.shape(state[key])}" if key in state else "nothing"
                raise UserError(
                    f"saved state of {self.name}: {key} should have shape {array.shape}, found {saved}; "
                    "go on with the env settings the state was saved with"
                )
        self._stop_videos()
        self._restore(state)

    def _stop_video(self, row: int) -> None:
        if row in self._recorders:
            self._recorders.pop(row).close()

    def _stop_videos(self) -> None:
        for row in list(self._recorders):
            self._stop_video(row)

    def close(self) -> None:
        """Ends videos and the window."""
        self._stop_videos()
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
