"""Pictures of plans while a model is trained, as PNG files in the folder of its experiment.

Shape letters: n plans, H steps (one more where the state before a plan is shown, too), O observation, A action.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.locomotion import LocomotionPhysics, LocomotionVectorEnv
from diffusion_rl.envs.maze2d import Maze2D
from diffusion_rl.envs.video import planned_states
from diffusion_rl.reports.pictures import save_lines, save_maze
from diffusion_rl.tasks.registry import task_named

FRAMES = 6  # of a plan, evenly spaced in time


class Renderer:
    """Draws plans, as lines where the renderer of that name cannot (which is said once).

    Args:
        name: of `options.RENDERERS`.
        dataset: whose task the plans are of.
        folder: of the pictures.
        say: prints a line.
    """

    def __init__(self, name: str, dataset: str, folder: Path, say: Callable[[str], None] = print):
        known = {"utils.MuJoCoRenderer": self._mujoco, "utils.Maze2dRenderer": self._maze}
        self.dataset, self.folder, self.say, self._draw = dataset, folder, say, known.get(name, self._lines)

    def composite(self, name: str, observations: np.ndarray, actions: np.ndarray) -> None:
        """Draws plans below each other or side by side.

        Args:
            observations: [n,H,O], or [n,1,O], the first ones, where actions alone are planned.
            actions: [n,H,A]; both in the environment's units.
        """
        try:
            self._draw(self.folder / name, observations, actions)
        except UserError as error:
            self.say(f"{error}: plans are drawn as lines")
            self._draw = self._lines
            self._draw(self.folder / name, observations, actions)

    def _lines(self, path: Path, observations: np.ndarray, actions: np.ndarray) -> None:
        save_lines(path, observations if observations.shape[1] > 1 else actions)

    def _maze(self, path: Path, observations: np.ndarray, actions: np.ndarray) -> None:
        save_maze(path, Maze2D(self.dataset).cells != "#", observations, observations[:, -1, :2])

    def _mujoco(self, path: Path, observations: np.ndarray, actions: np.ndarray) -> None:
        """Draws a row for each plan: the planned states, or where there are none what the simulator makes of it."""
        task = task_named(self.dataset)
        if task is None or task.simulator != "locomotion":
            raise UserError(f"{self.dataset} is no task of locomotion, whose plans MuJoCo draws")
        with contextlib.closing(LocomotionVectorEnv(self.dataset, 1, threads=1)) as env:
            if observations.shape[-1] != env.physics.obs_dim:
                raise UserError(f"{self.dataset} has observations of {env.physics.obs_dim} numbers, these are others")
            if observations.shape[1] > 1:
                plans = [planned_states(env.physics, plan, np.zeros(2)) for plan in observations]
            else:
                plans = [simulated(env.physics, *plan) for plan in zip(observations[:, 0], actions, strict=True)]
            shown = np.linspace(0, len(plans[0]) - 1, min(FRAMES, len(plans[0]))).round().astype(int)
            recorder = env.recorder(str(path))
            for states in plans:
                recorder.add(states[shown])
            recorder.close()


def simulated(physics: LocomotionPhysics, observation: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Returns the states [H,1+nq+nv] that actions [H,A] lead to from an observation [O]."""
    nq = physics.model.nq
    start, warm = physics.state_from(np.append(0, observation[: nq - 1]), observation[nq - 1 :])
    return physics.step(start[None], warm[None], np.clip(actions, -1, 1)[None]).states[0]
