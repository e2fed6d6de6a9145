"""A scripted vector environment and a tape of recorded draws, to drive our loops with the reference's experiences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """Same fields as `envs.interface.StepResult`."""

    observations: dict[str, np.ndarray]
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    infos: dict[str, Any]


class ScriptedEnv:
    """Answers the k-th reset and the t-th step with what was recorded; keeps the actions it got.

    Args:
        script: reset_obs [R,E,To,O], obs and final_obs [T,E,To,O], reward, terminated and truncated [T,E]; with
            images also reset_rgb [R,E,Ti,C,Hi,Wi] and rgb [T,E,Ti,C,Hi,Wi].
    """

    restorable = False

    def __init__(self, script: dict[str, np.ndarray], act_steps: int):
        self.script, self.act_steps = script, act_steps
        self.n_envs = script["reward"].shape[1]
        self.obs_spec = {"state": script["obs"].shape[3:]}
        self.resets, self.t = 0, 0
        self.actions: list[np.ndarray] = []

    def reset(self, options: Sequence[dict] | None = None) -> dict[str, np.ndarray]:
        self.resets += 1
        return self._observed(self.resets - 1, "reset_obs", "reset_rgb")

    def _observed(self, row: int, state: str, rgb: str) -> dict[str, np.ndarray]:
        names = {"state": state} | ({"rgb": rgb} if rgb in self.script else {})
        return {key: self.script[name][row].copy() for key, name in names.items()}

    def step(self, actions: np.ndarray) -> Step:
        t, script = self.t, self.script
        self.actions.append(np.array(actions))
        self.t += 1
        return Step(
            self._observed(t, "obs", "rgb"),
            script["reward"][t].copy(),
            script["terminated"][t].copy(),
            script["truncated"][t].copy(),
            {"final_observations": {"state": script["final_obs"][t].copy()}},
        )

    def seed(self, seeds: Sequence[int]) -> None:
        pass

    def get_state(self) -> dict[str, np.ndarray]:
        return {}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        pass

    def close(self) -> None:
        pass


class Tape:
    """Recorded draws as a noise source: one stream per kind of draw, read in row-major order.

    A loop may so ask for a whole sample's or a whole epoch's noise at once, or piece by piece.
    """

    KINDS = {
        **dict.fromkeys(("torch.randn", "torch.randn_like", "Normal.sample.eps", "Normal.rsample.eps"), "normal"),
        **dict.fromkeys(("torch.randint", "np.random.choice"), "integers"),
        **dict.fromkeys(("torch.rand", "np.random.uniform"), "uniform"),
        "torch.multinomial": "choices",
    }
    PERMUTATIONS = ("torch.randperm", "np.random.shuffle.perm")

    def __init__(self, draws: Sequence[tuple[str, np.ndarray]]):
        parts: dict[str, list[np.ndarray]] = {kind: [] for kind in ("normal", "integers", "uniform", "choices")}
        self._permutations = [a for fn, a in draws if fn in self.PERMUTATIONS]
        for fn, array in draws:
            if fn not in self.PERMUTATIONS:
                parts[self.KINDS[fn]].append(array.reshape(-1))
        self._streams = {k: np.concatenate(v) if v else np.zeros(0) for k, v in parts.items()}
        self._position = dict.fromkeys(parts, 0)

    def _take(self, kind: str, shape: Sequence[int]) -> np.ndarray:
        start, size = self._position[kind], int(np.prod(shape))
        if start + size > len(self._streams[kind]):
            raise ValueError(f"the tape has {len(self._streams[kind]) - start} {kind} values left, asked for {shape}")
        self._position[kind] += size
        return self._streams[kind][start : start + size].reshape(tuple(shape))

    def normal(self, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        return self._take("normal", shape).astype(dtype)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> np.ndarray:
        return self._take("integers", shape)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: Any = np.float32) -> np.ndarray:
        return (low + (high - low) * self._take("uniform", shape)).astype(dtype)

    def distinct(self, high: int, n: int) -> np.ndarray:
        return self._take("integers", (n,))

    def choose(self, weights: np.ndarray) -> np.ndarray:
        return self._take("choices", (len(weights),))

    def permutation(self, n: int) -> np.ndarray:
        if not self._permutations or len(self._permutations[0]) != n:
            raise ValueError(f"the tape's next permutation is not one of {n} items")
        return self._permutations.pop(0)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass

    @property
    def left_over(self) -> str:
        """What was recorded and not asked for; empty if nothing."""
        left = {k: len(s) - self._position[k] for k, s in self._streams.items()}
        left["permutations"] = len(self._permutations)
        return ", ".join(f"{n} {k}" for k, n in left.items() if n)
