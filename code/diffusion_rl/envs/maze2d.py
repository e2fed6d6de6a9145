"""Maze2D: a ball that is pushed through a maze of square cells, with D4RL's layouts, sizes and rules, on MuJoCo.

Positions are in cells, (row, column); D4RL's ball rests at whole numbers where a cell's centre is 0.2 less.
Observation: position and velocity, [4]; action: the force's share along both axes, [2] in [-1, 1]. The reward is 1
within half a cell of the goal. An episode never ends before its limit of steps.
"""

from __future__ import annotations

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.typing import Rng
from diffusion_rl.tasks.registry import steps_of

try:
    import mujoco
except ImportError as error:  # pragma: no cover - depends on the installation
    raise UserError('Maze2D needs mujoco: pip install -e ".[gym]"') from error

# Rows of cells; # wall, O free, G the goal.
LAYOUTS = {
    "umaze": "##### #GOO# ###O# #OOO# #####",
    "medium": "######## #OO##OO# #OO#OOO# ##OOO### #OO#OOO# #O#OO#O# #OOO#OG# ########",
    "large": (
        "############ #OOOO#OOOOO# #O##O#O#O#O# #OOOOOO#OOO# #O####O###O# #OO#O#OOOOO# ##O#O#O#O### #OO#OOO#OGO# "
        "############"
    ),
}
REACHED, NOISE, FASTEST = 0.5, 0.1, 5.0  # distance of the goal; spread of a start; bound on each velocity
OFFSET = -0.2  # of the walls


def size_of(name: str) -> str:
    """Finds "umaze", "medium" or "large" in "maze2d-umaze-v1". Raises UserError for other names."""
    size = name.removeprefix("maze2d-").split("-")[0]
    if not name.startswith("maze2d-") or size not in LAYOUTS:
        raise UserError(f"{name!r} is no maze: there are {', '.join(f'maze2d-{size}-v1' for size in LAYOUTS)}")
    return size


def goal_of(name: str) -> np.ndarray:
    """Returns the fixed goal [2] of a data set's maze."""
    return np.argwhere(_cells(size_of(name)) == "G")[0].astype(float)


def _cells(size: str) -> np.ndarray:
    return np.array([list(row) for row in LAYOUTS[size].split()])


class Maze2D:
    """Simulates one maze.

    Args:
        name: "maze2d-umaze-v1" and the like.
    """

    observation_dim, action_dim = 4, 2

    def __init__(self, name: str):
        self.size = size_of(name)
        self.cells = _cells(self.size)
        self.free = np.argwhere(self.cells != "#")
        self.target, self.max_episode_steps = goal_of(name), steps_of(name)
        self._model = mujoco.MjModel.from_xml_string(_xml(self.cells))
        self._data = mujoco.MjData(self._model)

    def reset(self, rng: Rng, start: np.ndarray | None = None) -> np.ndarray:
        """Begins at rest near a free cell (a drawn one, or `start` [2]); returns the observation [4]."""
        mujoco.mj_resetData(self._model, self._data)
        cell = self.free[rng.integers(0, len(self.free), (1,))[0]] if start is None else np.asarray(start)
        self._data.qpos[:] = cell + rng.uniform((2,), -NOISE, NOISE, np.float64)
        mujoco.mj_forward(self._model, self._data)
        return self.observation()

    def draw_target(self, rng: Rng) -> None:
        """Draws another goal from the free cells."""
        self.target = self.free[rng.integers(0, len(self.free), (1,))[0]].astype(float)

    def observation(self) -> np.ndarray:
        """Returns position and velocity, [4]."""
        return np.concatenate([self._data.qpos, self._data.qvel])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float]:
        """Executes an action [2]; returns the observation [4] and the reward."""
        self._data.qvel[:] = np.clip(self._data.qvel, -FASTEST, FASTEST)
        self._data.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(self._model, self._data)
        observation = self.observation()
        return observation, float(np.linalg.norm(observation[:2] - self.target) <= REACHED)

    def path(self, start: np.ndarray, goal: np.ndarray) -> list[np.ndarray]:
        """Finds the cells [2] of a shortest way between the cells of two positions [2], both ends included."""
        first, last = (tuple(np.rint(p).astype(int)) for p in (start, goal))
        before: dict[tuple[int, ...], tuple[int, ...] | None] = {last: None}
        queue = [last]
        for cell in queue:
            for step in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                near = (cell[0] + step[0], cell[1] + step[1])
                if near not in before and self.cells[near] != "#":
                    before[near] = cell
                    queue.append(near)
        way: list[np.ndarray] = []
        at: tuple[int, ...] | None = first
        while at is not None:
            way.append(np.array(at, float))
            at = before.get(at)
        return way


def _xml(cells: np.ndarray) -> str:
    """Returns MuJoCo's model of the maze: a ball on two sliding joints among boxes."""
    walls = "".join(
        f'<geom type="box" pos="{row + OFFSET} {column + OFFSET} 0" size="0.5 0.5 0.2"/>'
        for row, column in np.argwhere(cells == "#")
    )
    return f"""
    <mujoco>
      <compiler angle="radian" coordinate="local"/>
      <option timestep="0.01" gravity="0 0 0" integrator="RK4"/>
      <default>
        <joint damping="1" limited="false"/>
        <geom friction="0.5 0.1 0.1" density="1000" margin="0.002" condim="1" contype="2" conaffinity="1"/>
        <motor ctrlrange="-1 1" ctrllimited="true" gear="100"/>
      </default>
      <worldbody>
        <body name="ball" pos="0 0 0">
          <geom name="ball" type="sphere" size="0.1" contype="1" conaffinity="2"/>
          <joint name="row" type="slide" axis="1 0 0" pos="0 0 0"/>
          <joint name="column" type="slide" axis="0 1 0" pos="0 0 0"/>
        </body>
        {walls}
      </worldbody>
      <actuator><motor joint="row"/><motor joint="column"/></actuator>
    </mujoco>"""
