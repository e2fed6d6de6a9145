"""DiffuserLite (Dong et al. 2024, arXiv:2401.15443): plan states from coarse to fine, act on the first two.

A plan of H states that are `stride` environment steps apart is sampled; the next level refines its first interval
alone, and the last level has stride 1. Inverse dynamics turn the last level's first two states into the action.

Shape letters: B batch, E environments, C candidates, L levels, H states of a level, O observation, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.diffusion import rectified_flow, vp_flow
from diffusion_rl.methods.diffuser_lite.program import Program
from diffusion_rl.networks.dit import ConditionalDiT
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.networks.iql import StateValue
from diffusion_rl.networks.layers import Array, variables_of
from diffusion_rl.policies.diffusion import clone

BACKBONES = {"flow": rectified_flow, "diffusion": vp_flow}


class LevelShape(NamedTuple):
    """What one level plans."""

    states: int  # H
    stride: int  # environment steps between them
    span: int  # environment steps from the first to the last, both counted


def level_shapes(planning_horizons: Sequence[int]) -> list[LevelShape]:
    """The levels from coarse to fine: the first interval of one is the whole of the next.

    [5, 5, 9] spans 129, 33 and 9 steps, in strides of 32, 8 and 1.
    """
    shapes = [LevelShape(planning_horizons[-1], 1, planning_horizons[-1])]
    for states in reversed(planning_horizons[:-1]):
        stride = shapes[0].span - 1
        shapes.insert(0, LevelShape(states, stride, (states - 1) * stride + 1))
    return shapes


class PlanLevel:
    """A level's model of H states given a return; the first state is known, below the first level the last one, too.

    Args:
        network: trained; `ema` is its average.
        states: H.
        first: whether it is the coarsest level.
        next_obs_weight: of the error of the second state.
        backbone: "flow" (rectified flow) or "diffusion".
    """

    def __init__(
        self,
        network: ConditionalDiT,
        states: int,
        observation_dim: int,
        first: bool,
        next_obs_weight: float = 10.0,
        backbone: str = "flow",
    ):
        if backbone not in BACKBONES:
            raise UserError(f"backbone={backbone!r}: choose one of {', '.join(BACKBONES)}")
        self.network, self.ema, self.backbone = network, clone(network), BACKBONES[backbone]
        self.shape = states, observation_dim
        self.mask: np.ndarray | None = np.zeros(self.shape, np.float32)
        self.mask[[0] if first else [0, -1]] = 1
        self.weights: np.ndarray | None = np.ones(self.shape, np.float32)
        self.weights[1] = next_obs_weight

    @property
    def unknown(self) -> slice:
        """The states from the first to the last of which something is not known."""
        if self.mask is None:
            return slice(self.shape[0])
        some = np.flatnonzero((self.mask == 0).any(axis=1))
        return slice(int(some[0]), int(some[-1]) + 1)

    @property
    def dtype(self) -> tf.DType:
        return variables_of(self.network)[0].dtype

    def loss(self, x0: Array, x1: Array, t: Array, condition: Array | None = None, keep: Array | None = None) -> Array:
        """Of clean plans and noise [B,H,O] at t [B] in [0, 1); condition [B,1], keep [B] of 0 and 1."""

        def output(x: Array, t: Array) -> Array:
            return self.network(x, t, condition, keep, self.unknown)

        return self.backbone.loss(output, x0, x1, t, self.mask, self.weights, self.unknown)

    def sample(
        self,
        noise: Array,
        known: Array,
        grid: np.ndarray,
        condition: Array | None = None,
        guidance: float = 0.0,
        keep: Array | None = None,
        use_ema: bool = True,
        repeat_last: int = 0,
    ) -> Array:
        """Plans [B,H,O] from noise, unrolled over the steps.

        Args:
            known: [B,H,O], of which the known states count.
            grid: times, ascending from 0.
            condition: returns [B,1]; guidance: 0 ignores them, 1 is the conditional model, more exaggerates.
        """
        network = self.ema if use_ema else self.network
        embedded = None if condition is None else network.condition(condition, keep)

        def output(x: Array, t: Array) -> Array:
            if embedded is None or guidance == 0:
                return network.diffusion(x, t)
            if guidance == 1:
                return network.diffusion(x, t, embedded)
            both = tf.concat([embedded, tf.zeros_like(embedded)], axis=0)
            wanted, free = tf.split(network.diffusion(tf.concat([x, x], axis=0), tf.concat([t, t], axis=0), both), 2)
            return rectified_flow.guided(wanted, free, guidance)

        return rectified_flow.sample(output, noise, self.backbone.steps(grid), known, self.mask, repeat_last)


class Acting(NamedTuple):
    """How plans are sampled.

    Attributes:
        steps: denoising steps of every level.
        temperature: standard deviation of the first noise.
        guidance: of each level.
        candidates: plans of the first level, of which the one is taken whose state `judged` has the largest value.
        use_ema: sample from the averaged weights.
    """

    steps: int = 3
    temperature: float = 0.5
    guidance: tuple[float, ...] = (1.0, 1.0, 1.0)
    candidates: int = 1
    judged: int = -1
    use_ema: bool = True


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
        self._told: tuple[bytes, list[Array]] = b"", []  # returns that were wanted last, and what they mean

    def draw(self, noise: Any, n_envs: int) -> list[np.ndarray]:
        """The draws of one decision: noise of each level [E,H,O], of the first one [E*C,H,O]."""
        rows = [n_envs * (self.acting.candidates if i == 0 else 1) for i in range(len(self.levels))]
        return [noise.normal((n, *level.shape)) for n, level in zip(rows, self.levels, strict=True)]

    def act(self, observations: np.ndarray, targets: np.ndarray, noise: Sequence[np.ndarray]) -> np.ndarray:
        """Actions [E,A] for observations [E,O] in the environment's units, aiming at returns [E]."""
        if self.runtime == "plain":
            tensors = (tf.constant(each, self.levels[0].dtype) for each in (observations, targets, *noise))
            state, wanted, *draws = tensors
            return self.plan(state, wanted, draws).numpy()
        wanted = targets[:1] if (targets == targets[0]).all() else targets
        if wanted.tobytes() != self._told[0]:
            self._told = wanted.tobytes(), self._tables(tf.constant(wanted, self.levels[0].dtype))
        sizes = len(observations), len(wanted)
        if sizes not in self._runs:
            self._runs[sizes] = self._run(*sizes)
        return self._runs[sizes](observations, self._told[1], noise)

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
        """`act` with tensors, as it reads in the paper; the programs are compared with it. Graph-safe."""
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
        """Of each environment's candidates [E*C,H,O] the one of the largest value, [E,H,O]."""
        grouped = tf.reshape(plans, [-1, copies, *plans.shape[1:]])
        values = self.value(grouped[:, :, self.acting.judged])[..., 0]
        return tf.gather(grouped, tf.argmax(values, axis=1), axis=1, batch_dims=1)
