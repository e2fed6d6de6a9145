"""D3IL's avoiding task (Jia et al. 2024, arXiv:2402.14606) as DPPO has it: a Panda guides a rod past obstacles.

  observation [4]: the setpoint (x, y) and the position (x, y) of the tool
  action [2]: change of the setpoint, which is not clipped; the tool then moves for 35 ms
  reward (`avoiding-m5`): -0.1 for ever after the rod touched an obstacle; -0.1 outside 0.2 < x < 0.8; else 1 if the
      third row was passed in gap 5, plus 1 if y > 0.4. `avoiding-m6` to `-m8` reward the other gaps.
  end: none but the time limit
  start: always the same; nothing is random

Observation and reward of a step are those of the state in which its action *begins*, as in DPPO's environment: the
policy sees the setpoint and the position that its last action met, not what it led to.

Shape letters: E environments, N of them, Ta actions of a chunk, To history.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs import panda
from diffusion_rl.envs.batched import BatchedVectorEnv
from diffusion_rl.envs.chunks import ChunkOutcome, StepOutcomes
from diffusion_rl.envs.interface import EnvRequest
from diffusion_rl.tasks import avoiding

REWARDED = {f"avoiding-m{mode}": mode for mode in (5, 6, 7, 8)}
OBS_DIM, ACTION_DIM = 4, 2
PENALTY = -0.1
FPS = round(1 / (panda.DT * panda.MILLISECONDS))
CAMERA = {"lookat": (0.45, 0.05, 0.1), "distance": 1.6, "elevation": -55.0, "azimuth": 180.0}


def vector(request: EnvRequest) -> AvoidingVectorEnv:
    """Builds the environments of a request."""
    return AvoidingVectorEnv(
        request.name,
        len(request.seeds),
        act_steps=request.act_steps,
        normalizer=request.normalizer,
        render=request.window,
        **request.chunks,
    )


class AvoidingVectorEnv(BatchedVectorEnv):
    """E avoiding tasks.

    Args:
        name: avoiding-m5 to avoiding-m8.
        chunks: arguments of `BatchedVectorEnv`.

    Raises:
        UserError: the name is unknown, or there is no display.
    """

    def __init__(self, name: str, n_envs: int, **chunks: Any):
        if name not in REWARDED:
            raise UserError(f"environment {name!r} is unknown: choose one of {', '.join(REWARDED)}")
        self.physics = panda.PandaPhysics()
        super().__init__(name, n_envs, OBS_DIM, ACTION_DIM, **{"max_episode_steps": 100} | chunks)
        self._arms = panda.ArmStates.empty(n_envs)
        self._setpoints = np.zeros((n_envs, 2))
        self._modes = avoiding.new_modes(n_envs)
        self.collided = np.zeros(n_envs, dtype=bool)

    def _simulate(self, rows: np.ndarray, actions: np.ndarray) -> ChunkOutcome:
        arms = self._arms[rows]
        setpoints = np.cumsum(np.concatenate([self._setpoints[rows, None], actions], axis=1), axis=1)
        after = self.physics.move(arms, setpoints[:, 1:])
        tools = np.concatenate([arms.tool[:, None], after.tool], axis=1)
        touching = np.concatenate([arms.touching[:, None], after.touching[:, :-1]], axis=1)
        collided = self.collided[rows, None] | np.logical_or.accumulate(touching, axis=1)
        modes = self._modes_along(self._modes[rows], tools)
        observations = self._observe(setpoints[:, :-1], tools[:, :-1])
        rewards = self._rewards(tools[:, :-1], modes[:, :-1], collided)
        outcome = self._history.advance(rows, StepOutcomes.unending(observations, rewards))
        last = (np.arange(len(rows)), outcome.executed - 1)
        self._arms[rows] = after[last]
        self._setpoints[rows], self._modes[rows] = setpoints[:, 1:][last], modes[:, 1:][last]
        self.collided[rows] = collided[last]
        time = np.zeros((actions.shape[1], 1))  # of a full physics state; nothing shows it
        self._watch(
            rows, outcome.executed, lambda i: np.concatenate([time, after.position[i], after.velocity[i]], axis=-1)
        )
        return outcome

    def _modes_along(self, first: np.ndarray, tools: np.ndarray) -> np.ndarray:
        """Returns the gaps [N,Ta+1,3] taken up to each position [N,Ta+1,2], from those of the first position [N,3]."""
        modes = np.empty((*tools.shape[:2], first.shape[1]), dtype=first.dtype)
        modes[:, 0] = first
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
        """Returns normalised observations [...,4] of setpoints and positions (these in single precision) [...,2]."""
        return self._normalize(np.concatenate([setpoints, tools.astype(np.float32)], axis=-1))

    def _first_observations(self, rows: np.ndarray) -> np.ndarray:
        start = self.physics.start
        self._arms[rows] = start
        self._setpoints[rows] = start.tool.astype(np.float32)
        self._modes[rows] = avoiding.NOT_PASSED
        self.collided[rows] = False
        return self._observe(self._setpoints[rows], self._arms.tool[rows])

    def _arrays(self) -> dict[str, np.ndarray]:
        episode = {"setpoints": self._setpoints, "modes": self._modes, "collided": self.collided}
        return episode | {f"arm_{name}": array for name, array in self._arms.arrays().items()}

    def scene(self) -> tuple[Callable[[], Any], dict[str, Any], int]:
        return functools.partial(panda.load_model, visible=True), CAMERA, FPS
