"""Wrappers around one gymnasium environment: normalisation, and the reference's MultiStep.

They import neither TensorFlow nor a simulator, so that worker processes stay small. Ta actions of a chunk,
To observation history, O observation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.envs import chunks, randomness
from diffusion_rl.envs.interface import Observations

STATE, PICTURE = "state", "rgb"  # entries of observations

#: What `MultiStep.step` says of a chunk in its info beside the environment's own keys.
CHUNK_KEYS = ("executed_steps", "final_obs", "full_obs")

REWARD_AGGREGATES: dict[str, Callable[..., Any]] = {"sum": np.sum, "max": np.max, "min": np.min, "mean": np.mean}


class D4RLTerms(gymnasium.Wrapper):
    """Clips actions to [-1, 1] and ends episodes at a time limit as D4RL does: terminated, with gym's old info."""

    def __init__(self, env: gymnasium.Env, time_limit: int | None):
        super().__init__(env)
        self.time_limit = time_limit
        self._elapsed = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begins an episode; returns its observation [O]."""
        self._elapsed = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict]:
        """Executes an action [A], clipped to +-1; the time limit ends an episode as terminated."""
        observation, reward, terminated, _, info = self.env.step(np.clip(action, -1, 1))
        self._elapsed += 1
        if self.time_limit is not None and self._elapsed >= self.time_limit:
            info["TimeLimit.truncated"] = not terminated
            terminated = True
        return observation, reward, terminated, False, info


class LowdimWrapper(gymnasium.Wrapper):
    """Shows observations as {"state": [O]}, normalised and clamped; takes actions in [-1, 1].

    normalizer: None for raw values. keys: entries of a dict observation to concatenate, None for a plain vector.
    clamp: clip the normalised state to [-1, 1] (raw states are never clipped). never_terminates: drop the
    environment's own `terminated` (D3IL and robomimic episodes end by their time limit alone).
    """

    def __init__(
        self,
        env: gymnasium.Env,
        normalizer: MinMaxNormalizer | None = None,
        *,
        keys: Sequence[str] | None = None,
        clamp: bool = False,
        never_terminates: bool = False,
    ):
        super().__init__(env)
        self.normalizer = normalizer
        self.keys = keys
        self.clamp = clamp and normalizer is not None
        self.never_terminates = never_terminates
        self.observation_space = gymnasium.spaces.Dict(self._boxes())

    def _boxes(self) -> dict[str, gymnasium.Space]:
        raw: Any = self.env.observation_space
        if self.keys is None and len(raw.shape or ()) != 1:
            raise UserError(f"normalised observations must be vectors (a one-dimensional gymnasium Box), not {raw}")
        size = raw.shape[0] if self.keys is None else sum(raw[key].shape[0] for key in self.keys)
        return {"state": gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)}

    def observe(self, raw: Any) -> Observations:
        """Returns what the policy sees of a raw observation."""
        return {"state": self._state(raw)}

    def _state(self, raw: Any) -> np.ndarray:
        state = raw if self.keys is None else np.concatenate([raw[key] for key in self.keys])
        if self.normalizer is not None:
            state = self.normalizer.normalize_obs(state)
        return np.clip(state, -1, 1) if self.clamp else state

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Observations, dict]:
        raw, info = self.env.reset(seed=seed, options=options)
        return self.observe(raw), info

    def step(self, action: np.ndarray) -> tuple[Observations, Any, bool, bool, dict]:
        """Executes an action [A] in the policy's units."""
        if self.normalizer is not None:
            action = self.normalizer.unnormalize_action(action)
        raw, reward, terminated, truncated, info = self.env.step(action)
        return self.observe(raw), reward, terminated and not self.never_terminates, truncated, info


class ImageWrapper(LowdimWrapper):
    """Adds {"rgb": [C,Hi,Wi]} to `LowdimWrapper`: the cameras `image_keys` stacked on the channel axis, in 0 … 255.

    Pictures are bytes, which stay bytes, or numbers in [0, 1].
    """

    def __init__(
        self,
        env: gymnasium.Env,
        normalizer: MinMaxNormalizer | None = None,
        *,
        image_keys: Sequence[str],
        **kwargs: Any,
    ):
        self.image_keys = image_keys
        super().__init__(env, normalizer, **kwargs)

    def _boxes(self) -> dict[str, gymnasium.Space]:
        raw: Any = self.env.observation_space
        cameras = [raw[key].shape for key in self.image_keys]
        shape = (sum(camera[0] for camera in cameras), *cameras[0][1:])
        return {"rgb": gymnasium.spaces.Box(0, 255, shape), **super()._boxes()}

    def observe(self, raw: Any) -> Observations:
        images = np.concatenate([raw[key] for key in self.image_keys])
        return {"rgb": images if images.dtype == np.uint8 else images * 255, "state": self._state(raw)}


class MultiStep:
    """Executes chunks of actions and shows the last To observations: the reference's wrapper on gymnasium's interface.

    env: observations are a dict of arrays or one array, which becomes {"state": array}.
    max_episode_steps: the wrapper's own limit, which truncates; it does not speak where the environment ends the
    episode itself, or gives the key `TimeLimit.truncated` of gym's old interface in its info.
    reset_within_step: begin the next episode in the step that ends one. full_observations: report every frame.

    Attributes:
        succeeded: whether the environment has said `success` in the last chunk; None where it says nothing of it.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        *,
        n_obs_steps: int = 1,
        max_episode_steps: int | None = None,
        reward_agg_method: str = "sum",
        reset_within_step: bool = False,
        full_observations: bool = False,
    ):
        if reward_agg_method not in REWARD_AGGREGATES:
            raise UserError(f"reward_agg_method={reward_agg_method!r}: choose one of {', '.join(REWARD_AGGREGATES)}")
        self.env = env
        self.n_obs_steps = n_obs_steps
        self.max_episode_steps = max_episode_steps
        self.reset_within_step = reset_within_step
        self.full_observations = full_observations
        self.count = 0
        self.succeeded: bool | None = None
        self._aggregate = REWARD_AGGREGATES[reward_agg_method]
        space = env.observation_space
        if not isinstance(space, (gymnasium.spaces.Dict, gymnasium.spaces.Box)):
            raise UserError(f"observations must be arrays or a dict of arrays (gymnasium Box or Dict), not {space}")
        self._keys = list(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else ["state"]
        self._frames: deque[Observations] = deque(maxlen=n_obs_steps)
        self._infos: dict[str, deque] = {}
        self._recorder: Any = None

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Observations:
        """Begins an episode and returns its observations {key: [To,...]}.

        Args:
            options: `seed`, `video_path` (films this episode), and the environment's own.
        """
        options = dict(options or {})
        self._stop_video()
        seed = options.pop("seed", None) if seed is None else seed
        video_path = options.pop("video_path", None)
        raw, _ = self.env.reset(seed=None if seed is None else int(seed), options=options)
        self.count = 0
        frame = self._frame(raw)
        _require_finite([frame], [0.0], 0)
        self._frames.extend([frame] * self.n_obs_steps)
        self._infos = {}
        if video_path:
            self._start_video(video_path)
        return self._stacked()

    def step(self, actions: np.ndarray) -> tuple[Observations, np.ndarray, bool, bool, dict[str, Any]]:
        """Executes actions [Ta,A] (or one, [A]) until the episode ends.

        Returns:
            observations {key: [To,...]}, reward, terminated, truncated, and info: the last To values of each of the
            environment's keys; `executed_steps`; `full_obs` {key: [executed,...]} if asked for; `final_obs` where a
            truncated episode was followed by a reset.

        Raises:
            UserError: an observation or a reward is NaN or infinite.
        """
        if not self._frames:
            raise RuntimeError("step before the first reset")
        actions = np.atleast_2d(actions)
        terminated = truncated = False
        rewards: list[Any] = []
        frames: list[Observations] = []
        self.succeeded = None
        for action in actions:
            raw, reward, terminated, truncated, info = self.env.step(action)
            self.count += 1
            frames.append(self._frame(raw))
            rewards.append(reward)
            if "success" in info:
                self.succeeded = _either(self.succeeded, info["success"])
            terminated, truncated = self._flags(terminated, truncated, info)
            self._remember(info)
            self._record()
            if terminated or truncated:
                break
        if not rewards:
            raise ValueError("an empty chunk of actions")
        _require_finite(frames, rewards, self.count - len(rewards) + 1)
        # An early end counts one action more, as in the reference (see chunks.py).
        self.count += len(rewards) < len(actions)
        self._frames.extend(frames)
        observations = self._stacked()
        info = {key: _as_array(list(values)[-self.n_obs_steps :]) for key, values in self._infos.items()}
        info["executed_steps"] = len(rewards)
        if self.full_observations:
            info["full_obs"] = {key: np.stack([frame[key] for frame in frames]) for key in frames[-1]}
        if self.reset_within_step and (terminated or truncated):
            if truncated:
                info["final_obs"] = observations
            observations = self.reset()
        return observations, self._aggregate(rewards), bool(terminated), bool(truncated), info

    def _flags(self, terminated: bool, truncated: bool, info: Mapping[str, Any]) -> tuple[bool, bool]:
        if "TimeLimit.truncated" in info:
            return terminated, info["TimeLimit.truncated"]
        over = self.max_episode_steps is not None and self.count >= self.max_episode_steps
        return terminated, not terminated and (truncated or over)

    def _frame(self, raw: Any) -> Observations:
        """Copies the entries that the observation space names, since some simulators reuse their arrays."""
        return {key: np.array(raw[key] if isinstance(raw, Mapping) else raw) for key in self._keys}

    def _stacked(self) -> Observations:
        return {key: np.stack([frame[key] for frame in self._frames]) for key in self._frames[-1]}

    def _remember(self, info: Mapping[str, Any]) -> None:
        for key, value in info.items():
            if key not in CHUNK_KEYS:
                self._infos.setdefault(key, deque(maxlen=self.n_obs_steps)).append(value)

    def _start_video(self, path: str) -> None:
        from diffusion_rl.envs.video import VideoWriter  # rendering libraries load only when asked for

        self._recorder = VideoWriter(path, fps=int(self.env.metadata.get("render_fps", 30)))

    def _record(self) -> None:
        if self._recorder is not None:
            self._recorder.add(self.env.render())

    def _stop_video(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def get_random(self) -> randomness.State:
        """Returns the states of all generators that the environment may draw from."""
        return randomness.capture(self.env)

    def set_random(self, state: randomness.State) -> None:
        """Takes back what `get_random` returned; it takes effect with the next reset."""
        randomness.restore(self.env, state)

    def close(self) -> None:
        self._stop_video()
        self.env.close()


def _require_finite(frames: Sequence[Observations], rewards: Sequence[Any], first: int) -> None:
    """Raises UserError if an observation or a reward of the steps `first`, `first` + 1, … is NaN or infinite."""
    if math.isfinite(sum(rewards)) and all(_are_finite([frame[key] for frame in frames]) for key in frames[0]):
        return
    for step, (frame, reward) in enumerate(zip(frames, rewards, strict=True), first):
        named = [(f"observation {key!r}", values) for key, values in frame.items()]
        for what, values in [*named, ("reward", reward)]:
            if line := chunks.fault(what, values, step):
                raise UserError(line)


def _are_finite(arrays: Sequence[np.ndarray]) -> bool:
    return arrays[0].dtype.kind != "f" or bool(np.isfinite(np.concatenate(arrays, axis=None)).all())


def _either(before: bool | None, success: Any) -> bool | None:
    """Whether a step up to now has succeeded. success: a number or an array of them; what is none says nothing."""
    values = np.asarray(success)
    return bool(before) or bool((values > 0).any()) if values.dtype.kind in "biuf" else before


def _as_array(values: list[Any]) -> np.ndarray:
    """Values as one array, of objects where their shapes differ."""
    try:
        return np.array(values)
    except ValueError:
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array
