"""DiffuserLite (Dong et al. 2024, arXiv:2401.15443): plan states from coarse to fine, act on the first two.

A plan of H states that are `stride` environment steps apart is sampled; the next level refines its first interval
alone, and the last level has stride 1. Inverse dynamics turn the last level's first two states into the action.

Shape letters: B batch, E environments, C candidates, L levels, H states of a level, O observation, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.typing import Rng
from diffusion_rl.diffusion import rectified_flow
from diffusion_rl.methods.diffuser_lite.levels import Acting, PlanLevel
from diffusion_rl.methods.diffuser_lite.program import Program
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.networks.iql import StateValue
from diffusion_rl.networks.layers import Array


class DiffuserLite:
    """Acts by plans; from raw observations to actions it is one compiled program.

    Args:
        levels: from coarse to fine; with other weights later, a new planner is needed.
        inverse: inverse dynamics.
        means, stds: of the observations, [O].
        acting: see there.
        value: judges candidates; needed for more than one.
        runtime: of the program: "graph" (TensorFlow), "xla", "tflite" (for processors) or "plain" (`plan` as it is).
    """

    def __init__(
        self,
        levels: Sequence[PlanLevel],
        inverse: InverseDynamics,
        means: np.ndarray,
        stds: np.ndarray,
        acting: Acting,
        value: StateValue | None = None,
        runtime: str = "graph",
    ):
        if acting.candidates > 1 and value is None:
            raise UserError(f"{acting.candidates} candidates need a value to choose by: run mode=iql_training first")
        self.levels, self.inverse, self.means, self.stds = levels, inverse, means, stds
        self.acting, self.runtime = acting, runtime
        self.value: Any = value
        self.grid = rectified_flow.time_grid(acting.steps)
        self._runs: dict[tuple[int, int], Callable[..., np.ndarray]] = {}  # by numbers of environments and returns
        self._wanted: tuple[bytes, list[Array]] = b"", []  # the last returns to aim at, and their tables

    def draw(self, rng: Rng, n_envs: int) -> list[np.ndarray]:
        """Draws what one decision needs: noise of each level [E,H,O], of the first one [E*C,H,O]."""
        rows = [n_envs * (self.acting.candidates if i == 0 else 1) for i in range(len(self.levels))]
        return [rng.normal((n, *level.shape)) for n, level in zip(rows, self.levels, strict=True)]

    def act(self, observations: np.ndarray, targets: np.ndarray, noise: Sequence[np.ndarray]) -> np.ndarray:
        """Returns actions [E,A] for observations [E,O] in the environment's units, aiming at returns [E]."""
        if self.runtime == "plain":
            tensors = (tf.constant(array, self.levels[0].dtype) for array in (observations, targets, *noise))
            state, wanted, *draws = tensors
            return self.plan(state, wanted, draws).numpy()
        wanted = targets[:1] if (targets == targets[0]).all() else targets
        if wanted.tobytes() != self._wanted[0]:
            self._wanted = wanted.tobytes(), self._tables(tf.constant(wanted, self.levels[0].dtype))
        sizes = len(observations), len(wanted)
        if sizes not in self._runs:
            self._runs[sizes] = self._run(*sizes)
        return self._runs[sizes](observations, self._wanted[1], noise)

    @cached_property
    def _program(self) -> Program:
        return Program(self.levels, self.inverse, self.means, self.stds, self.acting, self.value)

    @cached_property
    def _tables(self) -> Callable[[Array], list[Array]]:
        returns = tf.TensorSpec([None], self.levels[0].dtype)
        return tf.function(self._program.tables, autograph=False).get_concrete_function(returns)

    def _run(self, n_envs: int, n_returns: int) -> Callable[..., np.ndarray]:
        if self.runtime == "tflite":
            return self._program.in_tflite(n_envs, n_returns)
        return self._program.in_graph(n_envs, n_returns, self.runtime == "xla")

    def plan(self, observations: Array, targets: Array, noise: Sequence[Array]) -> Array:
        """Decides as `act`, with tensors, as it reads in the paper; the programs are compared with it. Graph-safe."""
        acting, dtype = self.acting, noise[0].dtype
        state = (observations - tf.constant(self.means, dtype)) / tf.constant(self.stds, dtype)
        first, last, returns = state, tf.zeros_like(state), targets[:, None]
        plans = state[:, None]
        for i, (level, draws) in enumerate(zip(self.levels, noise, strict=True)):
            copies = acting.candidates if i == 0 else 1
            known = tf.stack([first, *[tf.zeros_like(first)] * (level.shape[0] - 2), last], axis=1)
            known, wanted = tf.repeat(known, copies, axis=0), tf.repeat(returns, copies, axis=0)
            scaled = draws * tf.constant(acting.temperature, dtype)
            plans = level.sample(scaled, known, self.grid, wanted, guidance=acting.guidance[i], use_ema=acting.use_ema)
            if copies > 1:
                plans = self._best(plans, copies)
            first, last = plans[:, 0], plans[:, 1]
        return self.inverse(plans[:, 0], plans[:, 1])

    def _best(self, plans: Array, copies: int) -> Array:
        """Returns the candidate of the largest value of each environment's [E*C,H,O], [E,H,O]."""
        grouped = tf.reshape(plans, [-1, copies, *plans.shape[1:]])
        values = self.value(grouped[:, :, self.acting.judged])[..., 0]
        return tf.gather(grouped, tf.argmax(values, axis=1), axis=1, batch_dims=1)
