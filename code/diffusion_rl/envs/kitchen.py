"""D4RL's Franka Kitchen (Gupta et al. 2019, arXiv:1910.11956; Fu et al. 2020, arXiv:2004.07219) in MuJoCo 3.

gymnasium-robotics carries D4RL's robot and kitchen over to the current MuJoCo; this module puts back what it changed.

As in D4RL
  observation [60]: positions of the robot's joints (9), positions of the objects (21), goal (30), where the goal holds
      the four elements of the task at their places in the positions and zeros elsewhere
  noise: uniform, a tenth of the amplitudes of D4RL's robot configuration, on robot and objects alike; the next
      joint command starts from the noisy positions
  action [9]: joint velocities in [-1, 1], doubled (rad/s, m/s), kept within the joints' limits, for 40 steps of 2 ms
  reward: number of elements that came within 0.3 of their goal in this step, each counted once in an episode, so that
      the return is the number of completed subtasks, 0 to 4
  end: terminated when all four are done; after 280 steps terminated and truncated, as gym's time limit said it
  start: the same joint positions every time

Not as in D4RL
  MuJoCo 3 instead of 2.1 steps contacts and friction differently, so trajectories of the same actions differ and
      returns are not comparable with published ones; bodies, joints and actuators compile to the same numbers
  the robot's pedestal collides
  the random numbers
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from typing import Any

import gymnasium
import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.multi_step import D4RLTerms
from diffusion_rl.envs.worker import EnvRecipe

N_ROBOT, N_OBJECTS = 9, 21

_LIGHT_SLIDER = ("microwave", "kettle", "light switch", "slide cabinet")
TASKS = {
    "kitchen-complete-v0": _LIGHT_SLIDER,
    "kitchen-partial-v0": _LIGHT_SLIDER,
    "kitchen-mixed-v0": ("microwave", "kettle", "bottom burner", "light switch"),
}
#: Where an element's joints stand among the 30 positions, and where they should be.
ELEMENTS: dict[str, tuple[slice, list[float]]] = {
    "bottom burner": (slice(11, 13), [-0.88, -0.01]),
    "light switch": (slice(17, 19), [-0.69, -0.05]),
    "slide cabinet": (slice(19, 20), [0.37]),
    "microwave": (slice(22, 23), [-0.75]),
    "kettle": (slice(23, 30), [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
}
COMPLETE_WITHIN = 0.3
NOISE_RATIO = 0.1
#: Amplitudes for the objects in D4RL's robot configuration (gymnasium-robotics reads them shifted by one joint).
_OBJECT_NOISE = np.repeat([0.005, 0.0005, 0.005, 0.1, 0.005, 0.1, 0.005], [2, 6, 3, 3, 3, 3, 1])


def require(name: str) -> None:
    """Raises UserError if `name` is no kitchen task or its simulator is not installed."""
    _elements_of(name)
    if importlib.util.find_spec("gymnasium_robotics") is None:
        raise UserError(f"{name} needs gymnasium-robotics: pip install -e '.[kitchen]' (see installation/kitchen.md)")


def single(recipe: EnvRecipe) -> gymnasium.Env:
    """Builds the environment of a recipe."""
    return D4RLTerms(Kitchen(recipe.name, render_mode=recipe.render_mode, **recipe.kwargs), recipe.d4rl_time_limit)


def _elements_of(name: str) -> tuple[str, ...]:
    if name not in TASKS:
        raise UserError(f"environment {name!r} is unknown: the kitchen tasks are {', '.join(TASKS)}")
    return TASKS[name]


def goal_of(name: str) -> np.ndarray:
    """Returns the goal [30], the last half of a task's observations. Raises UserError for an unknown task."""
    goal = np.zeros(N_ROBOT + N_OBJECTS)
    for element in _elements_of(name):
        where, target = ELEMENTS[element]
        goal[where] = target
    return goal


class Kitchen(gymnasium.Env):
    """One kitchen under its D4RL name. `kwargs` go to gymnasium-robotics' FrankaKitchen."""

    def __init__(self, name: str, **kwargs: Any):
        require(name)
        with contextlib.redirect_stderr(io.StringIO()):  # it announces changes to the rewards of other environments
            from gymnasium_robotics.envs.franka_kitchen import KitchenEnv
        self._env: Any = KitchenEnv(list(TASKS[name]), robot_noise_ratio=NOISE_RATIO, object_noise_ratio=0.0, **kwargs)
        self.metadata = self._env.metadata
        self.render_mode = self._env.render_mode
        self.goal = goal_of(name)
        self.elements = TASKS[name]
        self.remaining = set(self.elements)
        self.observation_space = gymnasium.spaces.Box(-8.0, 8.0, (2 * len(self.goal),), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (N_ROBOT,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begins an episode; returns its observation [O]."""
        observed, _ = self._env.reset(seed=seed)
        self.remaining = set(self.elements)
        return self._observe(observed), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Executes an action [A]; the reward counts what it completed. The episode ends when all is done."""
        observed, *_ = self._env.step(action)
        observation = self._observe(observed)
        completed = {element for element in self.remaining if self._is_complete(element, observation)}
        self.remaining -= completed
        return observation, float(len(completed)), not self.remaining, False, {}

    def _observe(self, observed: dict[str, Any]) -> np.ndarray:
        objects = self._env.data.qpos[N_ROBOT:].copy()
        random = self._env.robot_env.np_random
        objects += NOISE_RATIO * _OBJECT_NOISE * random.uniform(-1.0, 1.0, N_OBJECTS)
        return np.concatenate([observed["observation"][:N_ROBOT], objects, self.goal])

    def _is_complete(self, element: str, observation: np.ndarray) -> bool:
        where, target = ELEMENTS[element]
        return bool(np.linalg.norm(observation[where] - target) < COMPLETE_WITHIN)

    def render(self) -> Any:
        return self._env.render()

    def close(self) -> None:
        self._env.close()
