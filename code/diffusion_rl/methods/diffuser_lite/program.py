"""DiffuserLite's decision with nothing in it that is not needed: the fast form of `DiffuserLite.plan`.

What it leaves out:

* Time and the wanted return act on the network as shifts, scales and gates of its blocks ("tables"). They are computed
  when other returns are wanted, not in every decision, and once where all environments want the same.
* Of a level's last block only the states that are denoised are asked for; in the last step only those that the next
  level needs. The known states are attended to there, and what would become of them is not computed.

Shape letters: E environments, C candidates, G 2 with guidance else 1, U 1 or E different returns, K denoising steps,
H states, D width of the transformer, O observation, A action.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.quiet import without_stderr
from diffusion_rl.core.threads import sharing
from diffusion_rl.diffusion.rectified_flow import Steps, guided, time_grid
from diffusion_rl.methods.diffuser_lite.levels import Acting, PlanLevel
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.networks.iql import StateValue
from diffusion_rl.networks.layers import Array

ENVS_FOR_THREADS = 8  # below, sharing a product takes longer than it does


class LevelProgram:
    """A level's sampling.

    Args:
        guidance: see `PlanLevel.sample`.
        steps: of the denoising.
        wanted: the last state that is needed of the plans; those between the first and it come with it.
    """

    def __init__(self, level: PlanLevel, guidance: float, steps: Steps, use_ema: bool, wanted: int):
        self.network, self.steps, self.guidance = level.ema if use_ema else level.network, steps, guidance
        self.unknown, self.wanted = level.unknown, slice(level.unknown.start, wanted + 1)
        self.kinds = 1 if guidance in (0, 1) else 2  # G

    def table_shape(self, n_returns: int) -> tuple[int, ...]:
        network = self.network.diffusion
        return len(self.steps.times) * network.parts, self.kinds * n_returns, 1, network.d_model

    def tables(self, returns: Array) -> Array:
        """Returns what returns [U,1] and the times of the steps do to the layers, [K parts,G U,1,D]."""
        network, embedded = self.network.diffusion, self.network.condition(returns)
        if self.kinds == 2 or self.guidance == 0:
            embedded = tf.concat([*[embedded] * (self.kinds - 1), tf.zeros_like(embedded)], axis=0)
        times = tf.repeat(tf.constant(self.steps.times, embedded.dtype), tf.shape(embedded)[0])
        rows = network.modulation(times, tf.tile(embedded, [len(self.steps.times), 1]))
        tables = tf.reshape(rows, [len(self.steps.times), -1, network.parts, 1, network.d_model])
        return tf.reshape(tf.transpose(tables, [0, 2, 1, 3, 4]), [self.table_shape(1)[0], -1, 1, network.d_model])

    def sample(self, noise: Array, first: Array, last: Array | None, table: Array) -> Array:
        """Samples states [E,wanted,O], the second to the wanted one, from noise [E,H,O] between known states [E,O]."""
        before, after = first[:, None], [] if last is None else [last[:, None]]
        x, count, size = noise[:, self.unknown], len(self.steps.times), self.network.diffusion.parts
        parts = tf.unstack(table)
        for k in range(count):
            states = self.wanted if k + 1 == count else self.unknown
            output = self._output(tf.concat([before, x, *after], axis=1), parts[k * size : (k + 1) * size], states)
            moved = x[:, : states.stop - states.start]
            x = float(self.steps.keep[k]) * moved + float(self.steps.gain[k]) * output
        return x

    def _output(self, x: Array, parts: Sequence[Array], states: slice) -> Array:
        """Computes the network's output for x [E,H,O], guided, [E,states,O]."""
        network = self.network.diffusion
        if self.kinds == 1:
            return network.estimate(x, parts, states)
        if parts[0].shape[0] == self.kinds:  # the same returns for all
            parts = [tf.repeat(part, x.shape[0], axis=0) for part in parts]
        wanted, free = tf.split(network.estimate(tf.concat([x, x], axis=0), parts, states), 2)
        return guided(wanted, free, self.guidance)


class Program:
    """All levels, the choice among candidates and inverse dynamics.

    Arguments: `DiffuserLite`.
    """

    def __init__(
        self,
        levels: Sequence[PlanLevel],
        inverse: InverseDynamics,
        means: np.ndarray,
        stds: np.ndarray,
        acting: Acting,
        value: StateValue | None,
    ):
        self.inverse, self.means, self.stds, self.acting = inverse, means, stds, acting
        self.value: Any = value
        self.parts = []
        for i, level in enumerate(levels):
            wanted = acting.judged % level.shape[0] if i == 0 and acting.candidates > 1 else 1
            steps = level.backbone.steps(time_grid(acting.steps))
            self.parts.append(LevelProgram(level, acting.guidance[i], steps, acting.use_ema, wanted))
        self.shapes, self.dtype = [level.shape for level in levels], levels[0].dtype

    def tables(self, returns: Array) -> list[Array]:
        """Returns the tables of every level, for returns [U]. Graph-safe."""
        return [part.tables(returns[:, None]) for part in self.parts]

    def act(self, observations: Array, tables: Sequence[Array], noise: Sequence[Array]) -> Array:
        """Decides on actions [E,A] for observations [E,O]; noise of `DiffuserLite.draw`. Graph-safe, shapes known."""
        state = (observations - tf.constant(self.means, self.dtype)) * tf.constant(1 / self.stds, self.dtype)
        following: Array | None = None
        for i, (part, table, draws) in enumerate(zip(self.parts, tables, noise, strict=True)):
            first, copies = state, self.acting.candidates if i == 0 else 1
            if copies > 1:
                first = tf.repeat(state, copies, axis=0)
                table = table if table.shape[1] == part.kinds else tf.repeat(table, copies, axis=1)
            plans = part.sample(draws * self.acting.temperature, first, following, table)
            following = plans[:, 0] if copies == 1 else self._best(plans, copies)
        return self.inverse(state, following)

    def _best(self, plans: Array, copies: int) -> Array:
        """Returns the second state [E,O] of each environment's candidate [E*C,…,O] whose last state is worth most."""
        values = tf.reshape(self.value(plans[:, -1]), [-1, copies])
        seconds = tf.reshape(plans[:, 0], [-1, copies, plans.shape[-1]])
        return tf.gather(seconds, tf.argmax(values, axis=1), axis=1, batch_dims=1)

    # ---------- runtimes: (observations, tables, noise) as arrays -> actions ----------

    def specs(self, n_envs: int, n_returns: int) -> tuple[Any, list[Any], list[Any]]:
        """Describes the arguments of `act`."""
        tables, noise = [], []
        for i, (part, shape) in enumerate(zip(self.parts, self.shapes, strict=True)):
            tables.append(tf.TensorSpec(part.table_shape(n_returns), self.dtype, f"table{i}"))
            copies = self.acting.candidates if i == 0 else 1
            noise.append(tf.TensorSpec([n_envs * copies, *shape], self.dtype, f"noise{i}"))
        return tf.TensorSpec([n_envs, self.shapes[0][1]], self.dtype, "state"), tables, noise

    def in_graph(self, n_envs: int, n_returns: int, xla: bool = False) -> Callable[..., np.ndarray]:
        """Returns `act` as TensorFlow runs it; `xla`: compiled by XLA."""
        compiled = tf.function(self.act, autograph=False, jit_compile=xla or None)
        concrete = compiled.get_concrete_function(*self.specs(n_envs, n_returns))

        def act(observations: np.ndarray, tables: Sequence[Array], noise: Sequence[np.ndarray]) -> np.ndarray:
            draws = [tf.constant(array, self.dtype) for array in noise]
            return concrete(tf.constant(observations, self.dtype), list(tables), draws).numpy()

        return act

    def in_tflite(self, n_envs: int, n_returns: int) -> Callable[..., np.ndarray]:
        """Returns `act` as TFLite runs it, whose kernels lay weights out for products of a few rows."""
        compiled = tf.function(self.act, autograph=False)
        concrete = compiled.get_concrete_function(*self.specs(n_envs, n_returns))
        threads = 1 if n_envs < ENVS_FOR_THREADS else sharing()
        with without_stderr(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the interpreter will move to a package of its own
            model = tf.lite.TFLiteConverter.from_concrete_functions([concrete], self.inverse).convert()
            interpreter = tf.lite.Interpreter(model_content=model, num_threads=threads)
            interpreter.allocate_tensors()
        inputs = {i["name"].split("_")[-1].split(":")[0]: i["index"] for i in interpreter.get_input_details()}
        output = interpreter.get_output_details()[0]["index"]
        held: list[Any] = [None]  # the tables that the interpreter has

        def act(observations: np.ndarray, tables: Sequence[Array], noise: Sequence[np.ndarray]) -> np.ndarray:
            if tables is not held[0]:
                for i, table in enumerate(tables):
                    interpreter.set_tensor(inputs[f"table{i}"], table.numpy())
                held[0] = tables
            interpreter.set_tensor(inputs["state"], np.asarray(observations, np.float32))
            for i, draws in enumerate(noise):
                interpreter.set_tensor(inputs[f"noise{i}"], draws)
            interpreter.invoke()
            return interpreter.get_tensor(output)

        return act
