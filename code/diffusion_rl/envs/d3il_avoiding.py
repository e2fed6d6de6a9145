"""D3IL's avoiding task (Jia et al. 2024, arXiv:2402.14606) as DPPO has it: a Panda guides a rod past obstacles.

  observation [4]: the setpoint (x, y) and the position (x, y) of the tool
  action [2]: change of the setpoint, which is not clipped; the tool then moves for 35 ms
  reward (`avoiding-m5`): -0.1 for ever after the rod touched an obstacle; -0.1 outside 0.2 < x < 0.8; else 1 if the
      third row was passed in gap 5, plus 1 if y > 0.4. `avoiding-m6` to `-m8` reward the other gaps.
  end: none but the time limit
  start: always the same; nothing is random

Observation and reward of a step are those of the state in which its action *begins*, as in DPPO's environment: the
policy sees the setpoint and the position that its last action met, not what it led to.

Shape letters: E environments, Ta actions of a chunk, To history.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_rl.core import avoiding
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.normalizers import MinMaxNormalizer
from diffusion_rl.envs import panda
from diffusion_rl.envs.chunks import ChunkHistory, StepOutcomes
from diffusion_rl.envs.vector import Observations, StepResult

REWARDED = {f"avoiding-m{mode}": mode for mode in (5, 6, 7, 8)}
OBS_DIM, ACTION_DIM = 4, 2
PENALTY = -0.1
FPS = round(1 / (panda.DT * panda.MILLISECONDS))
CAMERA = {"lookat": (0.45, 0.05, 0.1), "distance": 1.6, "elevation": -55.0, "azimuth": 180.0}


class AvoidingVectorEnv:
    """E environments behind the `VectorEnv` interface; everything in them can be saved and restored.

    name: avoiding-m5 to avoiding-m8. normalizer: bounds of the data set, or None for raw observations and actions.
    render: show environment 0 in a window. Raises UserError for an unknown name, or if there is no display.
    """

    restorable = True

    def __init__(
        self,
        name: str,
        n_envs: int,
        *,
        act_steps: int = 1,
        n_obs_steps: int = 1,
        max_episode_steps: int | None = 100,
        reset_within_step: bool = False,
        full_observations: bool = False,
        normalizer: MinMaxNormalizer | None = None,
        render: bool = False,
    ):
        if name not in REWARDED:
            raise UserError(f"environment {name!r} is unknown: choose one of {', '.join(REWARDED)}")
        self.name = name
        self.n_envs = n_envs
        self.act_steps = act_steps
        self.reset_within_step = reset_within_step
        self.full_observations = full_observations
        self.normalizer = normalizer
        self.obs_spec: dict[str, tuple[int, ...]] = {"state": (OBS_DIM,)}
        self.action_dim = ACTION_DIM
        self.physics = panda.PandaPhysics()
        self._history = ChunkHistory(n_envs, n_obs_steps, OBS_DIM, max_episode_steps)
        self._arms = panda.ArmStates.empty(n_envs)
        self._setpoints = np.zeros((n_envs, 2))
        self._modes = avoiding.new_modes(n_envs)
        self.collided = np.zeros(n_envs, dtype=bool)
        self._started = False
        if render:
            from diffusion_rl.envs.video import StateViewer  # rendering libraries load only when asked for

            self._viewer = StateViewer(functools.partial(panda.load_model, visible=True), CAMERA)
        else:
            self._viewer = None
        self._recorders: dict[int, Any] = {}

    def seed(self, seeds: Sequence[int]) -> None:
        """Changes nothing: nothing is random."""
        if len(seeds) != self.n_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.n_envs} environments")

    def reset(self, options: Sequence[dict[str, Any]] | None = None) -> Observations:
        """Begin new episodes everywhere. options[i]: `video_path` (record from here on until its next reset)."""
        options = [{}] * self.n_envs if options is None else options
        if len(options) != self.n_envs:
            raise ValueError(f"{len(options)} options for {self.n_envs} environments")
        self._begin(np.arange(self.n_envs))
        self._started = True
        for row, option in enumerate(options):
            if option.get("video_path"):
                self._start_video(row, option["video_path"])
        return {"state": self._history.frames.copy()}

    def step(self, actions: np.ndarray) -> StepResult:
        """Execute chunks [E, Ta, 2] of normalised actions."""
        actions = np.asarray(actions)
        if actions.ndim != 3 or actions.shape[::2] != (self.n_envs, ACTION_DIM):
            raise ValueError(f"actions have shape {actions.shape}, expected ({self.n_envs}, Ta, {ACTION_DIM})")
        if not self._started:
            raise RuntimeError("step before the first reset")
        raw = actions if self.normalizer is None else self.normalizer.unnormalize_action(actions)
        setpoints = np.cumsum(np.concatenate([self._setpoints[:, None], raw], axis=1), axis=1)
        after = self.physics.move(self._arms, setpoints[:, 1:])
        tools = np.concatenate([self._arms.tool[:, None], after.tool], axis=1)
        touching = np.concatenate([self._arms.touching[:, None], after.touching[:, :-1]], axis=1)
        collided = self.collided[:, None] | np.logical_or.accumulate(touching, axis=1)
        modes = self._modes_along(tools)
        outcome = self._history.advance(
            np.arange(self.n_envs),
            StepOutcomes(
                observations=self._observe(setpoints[:, :-1], tools[:, :-1]),
                rewards=self._rewards(tools[:, :-1], modes[:, :-1], collided),
                done=np.zeros(collided.shape, dtype=bool),
                limit_known=np.zeros(collided.shape, dtype=bool),
                limit_hit=np.zeros(collided.shape, dtype=bool),
            ),
        )
        last = (np.arange(self.n_envs), outcome.executed - 1)
        self._arms = after[last]
        self._setpoints, self._modes, self.collided = setpoints[:, 1:][last], modes[:, 1:][last], collided[last]
        self._watch(after, outcome.executed)
        infos: dict[str, Any] = {"executed_steps": outcome.executed}
        if self.full_observations:
            infos["full_observations"] = {"state": outcome.frames}
        observations = outcome.observations
        if self.reset_within_step:
            infos["final_observations"] = {"state": outcome.observations}
            ended = np.flatnonzero(outcome.terminated | outcome.truncated)
            if len(ended):
                self._begin(ended)
                observations = self._history.frames.copy()
        return StepResult({"state": observations}, outcome.rewards, outcome.terminated, outcome.truncated, infos)

    def _modes_along(self, tools: np.ndarray) -> np.ndarray:
        """[E, Ta+1, 3] gaps taken up to each position [E, Ta+1, 2]; those of the first are known."""
        modes = np.empty((*tools.shape[:2], self._modes.shape[1]), dtype=self._modes.dtype)
        modes[:, 0] = self._modes
        for t in range(1, tools.shape[1]):
            modes[:, t] = modes[:, t - 1]
            avoiding.pass_rows(modes[:, t], tools[:, t])
        return modes

    def _rewards(self, tools: np.ndarray, modes: np.ndarray, collided: np.ndarray) -> np.ndarray:
        x, y = tools[..., 0], tools[..., 1]
        earned = (modes[..., -1] == REWARDED[self.name]).astype(np.float64) + (y > avoiding.GOAL_Y)
        outside = (x < avoiding.X_RANGE[0]) | (x > avoiding.X_RANGE[1])
        return np.where(collided | outside, PENALTY, earned)

    def _observe(self, setpoints: np.ndarray, tools: np.ndarray) -> np.ndarray:
        """[..., 4] normalised observations of setpoints and positions [..., 2]; positions have single precision."""
        raw = np.concatenate([setpoints, tools.astype(np.float32)], axis=-1)
        return raw if self.normalizer is None else self.normalizer.normalize_obs(raw)

    def _begin(self, rows: np.ndarray) -> None:
        """Begin new episodes in these environments."""
        for row in rows:
            self._stop_video(int(row))
        start = self.physics.start
        self._arms[rows] = start
        self._setpoints[rows] = start.tool.astype(np.float32)
        self._modes[rows] = avoiding.NOT_PASSED
        self.collided[rows] = False
        self._history.start(rows, self._observe(self._setpoints[rows], self._arms.tool[rows]))

    def get_state(self) -> dict[str, np.ndarray]:
        """The complete state as numeric arrays; a run that restores it goes on bit for bit."""
        return {name: array.copy() for name, array in self._state().items()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on where `get_state` was taken (a video being recorded ends). Raises UserError if it does not fit."""
        for name, array in self._state().items():
            if name not in state or np.shape(state[name]) != array.shape:
                found = f"shape {np.shape(state[name])}" if name in state else "nothing"
                raise UserError(
                    f"saved state of {self.name}: {name} should have shape {array.shape}, found {found}; "
                    "resume with the env settings the state was saved with"
                )
        for row in list(self._recorders):
            self._stop_video(row)
        for name, array in self._state().items():
            array[...] = state[name]
        self._started = True

    def _state(self) -> dict[str, np.ndarray]:
        own = {"setpoints": self._setpoints, "modes": self._modes, "collided": self.collided}
        history = {"chunk_steps": self._history.count, "history": self._history.frames}
        return own | history | {f"arm_{name}": array for name, array in self._arms.arrays().items()}

    def _start_video(self, row: int, path: str) -> None:
        from diffusion_rl.envs.video import StateRecorder  # rendering libraries load only when asked for

        load = functools.partial(panda.load_model, visible=True)
        self._recorders[row] = StateRecorder(load, CAMERA, path, FPS)

    def _watch(self, after: panda.ArmStates, executed: np.ndarray) -> None:
        """Hand the states to videos and window."""
        watchers = [*self._recorders.items(), *([(0, self._viewer)] if self._viewer else [])]
        for row, watcher in watchers:
            for t in range(executed[row]):
                watcher.add(np.concatenate([[0.0], after.position[row, t], after.velocity[row, t]]))

    def _stop_video(self, row: int) -> None:
        if row in self._recorders:
            self._recorders.pop(row).close()

    def close(self) -> None:
        """End videos and the window."""
        for row in list(self._recorders):
            self._stop_video(row)
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
