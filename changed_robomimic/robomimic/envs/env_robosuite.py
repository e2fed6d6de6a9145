"""robosuite's environments as robomimic presents them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
import robosuite

from robomimic.envs.env_base import EnvType
from robomimic.utils import obs_utils

if robosuite.__version__.startswith("1.4"):
    from robomimic.envs.quick_step import QuickStep
else:  # from 1.5 on, robosuite has other controllers and computes what follows from a state once a substep itself
    QuickStep = contextlib.nullcontext

Observation = dict[str, np.ndarray]


class EnvRobosuite:
    """One robosuite environment with robomimic's observations.

    An observation has `object` (robosuite's `object-state`), every entry of a robot (`robot0_eef_pos` …) and the
    cameras that were said to be of the modality "rgb", upright, [C, Hi, Wi] float32 in [0, 1].
    `env` is the environment of robosuite itself. Episodes never end by themselves.
    reflections: whether rendered images have the floor's faint ones, which take most of the time.
    """

    def __init__(
        self,
        env_name: str,
        render: bool = False,
        render_offscreen: bool = False,
        use_image_obs: bool = False,
        postprocess_visual_obs: bool = True,
        **kwargs: Any,
    ):
        self._name = env_name
        self.postprocess_visual_obs = postprocess_visual_obs
        self._init_kwargs = copy.deepcopy(kwargs) | {
            "has_renderer": render,
            "has_offscreen_renderer": render_offscreen or use_image_obs,
            "ignore_done": True,
            "use_object_obs": True,
            "use_camera_obs": use_image_obs,
            "camera_depths": False,
        }
        self.env: Any = robosuite.make(env_name, **copy.deepcopy(self._init_kwargs))
        for name in self.env.observation_names:
            if "joint_pos" in name or "eef_vel" in name:
                self.env.modify_observable(observable_name=name, attribute="active", modifier=True)
        self.reflections = True
        self._quick = QuickStep(self.env)

    def _set_reflections(self) -> None:
        """The context of the renderer lives as long as the simulation: until `hard_reset` makes a new one."""
        context = self.env.sim._render_context_offscreen
        if context is not None:
            context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = self.reflections

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, dict[str, Any]]:
        """observation, reward, done (always false), info after one action [A] in [-1, 1]."""
        with self._quick:
            raw, reward, _, info = self.env.step(action)
        return self.get_observation(raw), reward, self.is_done(), info

    def reset(self) -> Observation:
        """Begin an episode, drawn from numpy's global generator."""
        self._set_reflections()
        raw = self.env.reset()
        self._set_reflections()
        return self.get_observation(raw)

    def reset_to(self, state: Mapping[str, Any]) -> Observation | None:
        """Go to a saved state: `model`, the simulation's XML, and/or `states`, its flat state (see `get_state`).

        Returns the observation if there are `states`.
        """
        if "model" in state:
            self.reset()
            self.env.reset_from_xml_string(self.env.edit_model_xml(state["model"]))
            self.env.sim.reset()
            self._set_reflections()
        if "states" not in state:
            return None
        self.env.sim.set_state_from_flattened(state["states"])
        self.env.sim.forward()
        return self.get_observation()

    def get_state(self) -> dict[str, Any]:
        """{"model": XML, "states": [1 + nq + nv]}"""
        return {"model": self.env.sim.model.get_xml(), "states": np.array(self.env.sim.get_state().flatten())}

    def get_observation(self, di: Mapping[str, Any] | None = None) -> Observation:
        """The observation from robosuite's `di`, by default of the present state."""
        raw = self.env._get_observations(force_update=True) if di is None else di
        known = obs_utils.OBS_KEYS_TO_MODALITIES
        seen: Observation = {}
        for key in raw:
            if known.get(key) == "rgb":
                image = raw[key][::-1]  # OpenGL's rows begin at the bottom
                seen[key] = obs_utils.process_obs(image, obs_key=key) if self.postprocess_visual_obs else image
        seen["object"] = np.array(raw["object-state"])
        for robot in self.env.robots:
            prefix = robot.robot_model.naming_prefix
            for key, value in raw.items():
                if key.startswith(prefix) and key not in seen and not key.endswith("proprio-state"):
                    seen[key] = np.array(value)
        return seen

    def render(
        self, mode: str = "human", height: int = 256, width: int = 256, camera_name: str | None = None
    ) -> np.ndarray | None:
        """mode "rgb_array": [height, width, 3] uint8 from `camera_name` (agentview). "human": on the screen."""
        if mode == "human":
            self.env.render()
            return None
        if mode != "rgb_array":
            raise NotImplementedError(f"rendering mode {mode!r}")
        return self.env.sim.render(height=height, width=width, camera_name=camera_name or "agentview")[::-1]

    def is_success(self) -> dict[str, bool]:
        """{"task": whether it is done now}"""
        return {"task": bool(self.env._check_success())}

    def is_done(self) -> bool:
        """Episodes never end by themselves."""
        return False

    def get_reward(self) -> float:
        """The reward of the present state."""
        return self.env.reward()

    def serialize(self) -> dict[str, Any]:
        """Metadata from which `create_env_from_metadata` makes such an environment again."""
        return {
            "env_name": self.name,
            "env_version": robosuite.__version__,
            "type": self.type,
            "env_kwargs": copy.deepcopy(self._init_kwargs),
        }

    @property
    def name(self) -> str:
        """robosuite's name of the environment."""
        return self._name

    @property
    def type(self) -> int:
        """Its number in the metadata."""
        return EnvType.ROBOSUITE_TYPE

    @property
    def action_dimension(self) -> int:
        """Entries of an action."""
        return self.env.action_spec[0].shape[0]

    @property
    def base_env(self) -> Any:
        """The environment of robosuite."""
        return self.env

    def close(self) -> None:
        """Free the simulation and the renderer."""
        self.env.close()
