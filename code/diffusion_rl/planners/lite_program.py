"""DiffuserLite's decision with nothing in it that is not needed: the fast form of `DiffuserLite.plan`.

What it leaves out:

* Time and the wanted return act on the network as shifts, scales and gates of its blocks ("tables"). They are computed
  when other returns are wanted, not in every decision, and once where all environments want the same.
* Of a level's last block only the states that are denoised are asked for; in the last step only those that the next
  level needs. The known states are attended to there, and what would become of them is not computed.

Shape letters: E environments, C candidates, G 2 with guidance else 1, U 1 or E different returns, K denoising steps,
H states, D width, O observation, A action.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.diffusion.rectified_flow import Steps, guided, time_grid
from diffusion_rl.networks.dit import DiTBlock, gelu_tanh, normal, position_table, run
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.networks.iql import StateValue
from diffusion_rl.networks.layers import Array, Linear

if TYPE_CHECKING:
    from diffusion_rl.planners.diffuser_lite import Acting, PlanLevel


class Affine(NamedTuple):
    """A layer's weights as they are now: x @ kernel + bias."""

    kernel: Array
    bias: Array

    @classmethod
    def of(cls, linear: Linear, columns: slice = slice(None)) -> Affine:
        return cls(linear.kernel[:, columns], linear.bias[columns])

    def __call__(self, x: Array) -> Array:
        rows = tf.reshape(x, [-1, x.shape[-1]])
        return tf.reshape(tf.matmul(rows, self.kernel) + self.bias, [*x.shape[:-1], self.kernel.shape[1]])


class Block:
    """A transformer block of which some states can be asked for."""

    def __init__(self, block: DiTBlock):
        attention, width = block.attn, block.attn.out_proj.kernel.shape[0]
        self.heads, self.standard_residual = attention.heads, block.standard_residual
        self.everything = Affine.of(attention.in_proj)
        self.queries = Affine.of(attention.in_proj, slice(width))
        self.others = Affine.of(attention.in_proj, slice(width, None))
        self.mix, self.expand = Affine.of(attention.out_proj), Affine.of(block.mlp[0])
        self.project = Affine.of(block.mlp[3])

    def __call__(self, x: Array, parts: Sequence[Array], states: slice | None) -> Array:
        """x [G or 1,E,H,D], parts [G,U,1,D] -> [G,E,states,D]; None: all of them."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        inside = normal(x) * scale_attn + shift_attn
        base = x if self.standard_residual else inside
        if states is None:
            queries, keys, values = tf.split(self.everything(inside), 3, axis=-1)
        else:
            queries, base = self.queries(inside[:, :, states]), base[:, :, states]
            keys, values = tf.split(self.others(inside), 2, axis=-1)
        x = base + gate_attn * self.mix(self._attend(queries, keys, values))
        return x + gate_mlp * self.project(gelu_tanh(self.expand(normal(x) * scale_mlp + shift_mlp)))

    def _attend(self, queries: Array, keys: Array, values: Array) -> Array:
        """[G,E,states,D], [G,E,H,D] twice -> [G,E,states,D]"""
        shape, size = queries.shape, queries.shape[-1] // self.heads
        queries, keys, values = (
            tf.transpose(tf.reshape(each, [-1, each.shape[2], self.heads, size]), [0, 2, 1, 3])
            for each in (queries, keys, values)
        )
        weights = tf.nn.softmax(tf.matmul(queries * (1 / math.sqrt(size)), keys, transpose_b=True))
        return tf.reshape(tf.transpose(tf.matmul(weights, values), [0, 2, 1, 3]), shape)


class LevelProgram:
    """A level's sampling from weights as they are at construction.

    Args:
        guidance: see `PlanLevel.sample`.
        steps: of the denoising.
        wanted: the last state that is needed of the plans; those between the first and it come with it.
    """

    def __init__(self, level: PlanLevel, guidance: float, steps: Steps, use_ema: bool, wanted: int):
        self.network = level.ema if use_ema else level.network
        network, self.guidance, self.steps = self.network.diffusion, guidance, steps
        free = np.flatnonzero(level.mask[:, 0] == 0)
        self.free, self.wanted = slice(int(free[0]), int(free[-1]) + 1), slice(int(free[0]), wanted + 1)
        self.n_states, self.width = level.shape[0], network.d_model
        self.begin, self.blocks = Affine.of(network.x_proj), [Block(each) for each in network.blocks]
        self.end = Affine.of(network.final_layer.linear)

    def tables(self, returns: Array) -> Array:
        """What returns [U,1] and the times of the steps do to the blocks, [K (6 blocks + 2),G,U,1,D]."""
        network, dtype = self.network.diffusion, returns.dtype
        told = self.network.condition(returns)
        kinds = {0.0: [tf.zeros_like(told)], 1.0: [told]}.get(self.guidance, [told, tf.zeros_like(told)])
        layers = [*(block.adaLN_modulation for block in network.blocks), network.final_layer.adaLN_modulation]
        scales = [index for number in range(len(network.blocks)) for index in (6 * number + 1, 6 * number + 4)]
        plus = np.zeros((6 * len(network.blocks) + 2, 1, 1, 1))
        plus[[*scales, -1]] = 1
        found = []
        for time in self.steps.times:
            embedded = network.map_noise(tf.constant([time], dtype)) + tf.stack(kinds)  # [G,U,E]
            embedded = run(network.map_emb, tf.reshape(embedded, [-1, embedded.shape[-1]]))
            rows = tf.concat([run(layer, embedded) for layer in layers], axis=-1)
            parts = tf.reshape(rows, [len(kinds), -1, plus.shape[0], self.width])
            found.append(tf.transpose(parts, [2, 0, 1, 3]) + tf.constant(plus, dtype))
        return tf.concat(found, axis=0)[..., None, :]

    def sample(self, noise: Array, first: Array, last: Array | None, table: Array) -> Array:
        """States from the second to the wanted one [E,wanted,O] of plans from noise [E,H,O] to known states [E,O]."""
        known = [first[:, None], *([] if last is None else [last[:, None]])]
        x, parts, count = noise[:, self.free], tf.unstack(table), len(self.steps.times)
        each = len(parts) // count
        for k in range(count):
            states = self.wanted if k + 1 == count else self.free
            output = self._output(
                tf.concat([known[0], x, *known[1:]], axis=1), parts[k * each : (k + 1) * each], states
            )
            moved = x[:, : states.stop - states.start]
            x = float(self.steps.keep[k]) * moved + float(self.steps.gain[k]) * output
        return x

    def _output(self, x: Array, parts: Sequence[Array], states: slice) -> Array:
        """Of the network for x [E,H,O], guided, [E,states,O]."""
        positions = tf.constant(position_table(self.n_states, self.width), x.dtype)
        x = (self.begin(x) + positions)[None]
        for number, block in enumerate(self.blocks):
            last = number + 1 == len(self.blocks)
            x = block(x, parts[6 * number : 6 * number + 6], states if last else None)
        found = self.end(normal(x) * parts[-1] + parts[-2])
        return found[0] if found.shape[0] == 1 else guided(found[0], found[1], self.guidance)


class Program:
    """All levels, the choice among candidates and inverse dynamics.

    Args: as of `DiffuserLite`; weights of the levels are taken as they are now.
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
        self.inverse, self.means, self.stds, self.acting, self.value = inverse, means, stds, acting, value
        self.parts = []
        for i, level in enumerate(levels):
            wanted = acting.judged % level.shape[0] if i == 0 and acting.candidates > 1 else 1
            steps = level.backbone.steps(time_grid(acting.steps))
            self.parts.append(LevelProgram(level, acting.guidance[i], steps, acting.use_ema, wanted))
        self.shapes, self.dtype = [level.shape for level in levels], levels[0].dtype

    def tables(self, returns: Array) -> list[Array]:
        """Of every level, for returns [U]. Graph-safe."""
        return [part.tables(returns[:, None]) for part in self.parts]

    def act(self, observations: Array, tables: Sequence[Array], noise: Sequence[Array]) -> Array:
        """Observations [E,O] and noise as `DiffuserLite.draw` gives it -> actions [E,A]. Graph-safe, shapes known."""
        state = (observations - tf.constant(self.means, self.dtype)) * tf.constant(1 / self.stds, self.dtype)
        following: Array | None = None
        for i, (part, table, draws) in enumerate(zip(self.parts, tables, noise, strict=True)):
            first, copies = state, self.acting.candidates if i == 0 else 1
            if copies > 1:
                first = tf.repeat(state, copies, axis=0)
                table = table if table.shape[2] == 1 else tf.repeat(table, copies, axis=2)
            plans = part.sample(draws * self.acting.temperature, first, following, table)
            following = plans[:, 0] if copies == 1 else self._best(plans, copies)
        return self.inverse(state, following)

    def _best(self, plans: Array, copies: int) -> Array:
        """The second state [E,O] of each environment's candidate [E*C,…,O] whose last state is worth most."""
        values = tf.reshape(self.value(plans[:, -1]), [-1, copies])
        seconds = tf.reshape(plans[:, 0], [-1, copies, plans.shape[-1]])
        return tf.gather(seconds, tf.argmax(values, axis=1), axis=1, batch_dims=1)

    # ---------- runtimes: (observations, tables, noise) as arrays -> actions ----------

    def specs(self, n_envs: int, n_returns: int) -> tuple[Any, list[Any], list[Any]]:
        """Of the arguments of `act`."""
        tables, noise = [], []
        for i, (part, shape) in enumerate(zip(self.parts, self.shapes, strict=True)):
            rows = len(part.steps.times) * (6 * len(part.blocks) + 2)
            kinds = 1 if part.guidance in (0, 1) else 2
            tables.append(tf.TensorSpec([rows, kinds, n_returns, 1, part.width], self.dtype, f"table{i}"))
            copies = self.acting.candidates if i == 0 else 1
            noise.append(tf.TensorSpec([n_envs * copies, *shape], self.dtype, f"noise{i}"))
        return tf.TensorSpec([n_envs, self.shapes[0][1]], self.dtype, "state"), tables, noise

    def in_graph(self, n_envs: int, n_returns: int, xla: bool = False) -> Callable[..., np.ndarray]:
        """Run by TensorFlow; `xla`: compiled by XLA."""
        compiled = tf.function(self.act, autograph=False, jit_compile=xla or None)
        concrete = compiled.get_concrete_function(*self.specs(n_envs, n_returns))

        def act(observations: np.ndarray, tables: Sequence[Array], noise: Sequence[np.ndarray]) -> np.ndarray:
            draws = [tf.constant(each, self.dtype) for each in noise]
            return concrete(tf.constant(observations, self.dtype), list(tables), draws).numpy()

        return act

    def in_tflite(self, n_envs: int, n_returns: int, threads: int) -> Callable[..., np.ndarray]:
        """Run by TFLite, whose kernels lay weights out for products of a few rows."""
        compiled = tf.function(self.act, autograph=False)
        concrete = compiled.get_concrete_function(*self.specs(n_envs, n_returns))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the interpreter will move to a package of its own
            model = tf.lite.TFLiteConverter.from_concrete_functions([concrete], self.inverse).convert()
            interpreter = tf.lite.Interpreter(model_content=model, num_threads=threads)
        interpreter.allocate_tensors()
        inputs = {each["name"].split("_")[-1].split(":")[0]: each["index"] for each in interpreter.get_input_details()}
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
