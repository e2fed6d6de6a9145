"""Environments as users write them, old and odd; worker processes import this module, which registers them."""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

LENGTH = 6
VECTOR, ACTION = Box(-1, 1, (4,)), Box(-1, 1, (2,))
OBSERVATIONS = {
    "goal": Dict({"observation": VECTOR, "desired_goal": Box(-1, 1, (2,)), "achieved_goal": Box(-1, 1, (2,))}),
    "state": Dict({"state": VECTOR, "extra": Box(-1, 1, (2,)), "task": Discrete(3)}),
    "seen": Dict({"state": VECTOR, "rgb": Box(0, 255, (16, 24, 3), np.uint8)}),
    "seen as numbers": Dict({"state": VECTOR, "rgb": Box(0, 255, (3, 16, 24))}),
    "picture": Box(0, 255, (8, 8, 3), np.uint8),
    "matrix": Box(-1, 1, (2, 2)),
    "class": Discrete(3),
    "classes": Dict({"a": Discrete(3)}),
}
REWARDS: dict[str, Any] = {
    "array": np.array([1.0], np.float32),
    "none": None,
    "nan": float("nan"),
    "two": np.ones(2),
    "text": "1.0",
    "integer": 1,
    "infinite": float("inf"),
}


class Own(gymnasium.Env):
    """Observation: the step number everywhere; reward 1; terminates after `LENGTH` steps. Takes no render_mode.

    shows, pays: keys of `OBSERVATIONS` and `REWARDS`. gives: a wrong observation from step 3 on. info: what to add to
    the infos. stands: sleeps for ever in step 2.
    """

    metadata = {"render_modes": ["rgb_array"]}
    action_space: Any = ACTION

    def __init__(
        self,
        shows: str | None = None,
        pays: str | None = None,
        gives: Any = None,
        info: dict[str, Any] | None = None,
        stands: bool = False,
    ):
        self.observation_space = OBSERVATIONS.get(shows, VECTOR) if shows else VECTOR
        self.pays, self.gives, self.info, self.stands = pays, gives, info or {}, stands

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.number = 0
        return self.observe(), {}

    def observe(self) -> Any:
        space = self.observation_space
        shown = {key: np.full(one.shape, self.number, one.dtype) for key, one in getattr(space, "spaces", {}).items()}
        return shown or np.full(space.shape, self.number, np.float32)

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        self.number += 1
        if self.stands and self.number == 2:
            time.sleep(3600)
        observation = self.observe() if self.gives is None or self.number < 3 else self.gives
        reward = REWARDS[self.pays] if self.pays else 1.0
        return observation, reward, self.number >= LENGTH, False, dict(self.info)


class OldReset(Own):
    """reset() takes nothing and returns the observation alone; draws from `np_random`."""

    def reset(self) -> Any:  # type: ignore[override]
        self.number = 0
        self.first = self.np_random.random()
        return self.observe()

    def observe(self) -> Any:
        return np.full(4, self.first, np.float32)


class OldWrapper(gymnasium.Wrapper):
    """A wrapper of the user's own around a new environment, as old as `OldReset`."""

    def __init__(self) -> None:
        super().__init__(Own())

    def reset(self) -> Any:  # type: ignore[override]
        return self.env.reset()[0]


class OldStep(Own):
    """step() returns four values, a list as observation, and infos that no pipe carries."""

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        observation, reward, over, _, _ = super().step(action)
        odd = {"function": lambda: 0, 3: "number", "final_obs": None, "executed_steps": "many", "full_obs": 1}
        return observation.tolist(), reward, over, {**odd, "ragged": np.zeros((self.number, 2))}


class Succeeds(Own):
    """Says from step 4 on that it has succeeded, in the first episode alone."""

    key = "success"
    episode = 0

    def reset(self, **options: Any) -> tuple[Any, dict]:
        self.episode += 1
        return super().reset(**options)

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        return *super().step(action)[:-1], {self.key: np.array([self.number == 4 and self.episode == 1])}


class IsSuccess(Succeeds):
    key = "is_success"


class Classes(Own):
    action_space = Discrete(3)


class Fails(Own):
    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        raise RuntimeError("no licence\nfor this simulator " + 1000 * "!")


class Leaves(Own):
    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        raise SystemExit("no server")


for kind in (Own, OldReset, OldWrapper, OldStep, Succeeds, IsSuccess, Classes, Fails, Leaves):
    gymnasium.register(f"{kind.__name__}-v0", entry_point=kind)
gymnasium.register("Limited-v0", entry_point=OldStep, max_episode_steps=3)
