"""Many updates of an off-policy algorithm in one compiled call, its optimizers, schedules and their state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core import replicas
from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.core.optimizers import AdamW, OptimizerGroup
from diffusion_rl.core.precision import HALF, backward_in
from diffusion_rl.core.threads import has_gpu
from diffusion_rl.core.typing import Rng
from diffusion_rl.interop.torch_names import named_parameters
from diffusion_rl.methods.off_policy.algorithm import Part, Phase, Settings

log = logging.getLogger(__name__)

UPDATES_PER_CALL = 32  # compiled together; what is left over goes one by one
MOST_LOSSES = 6  # that one update reports

Draws = Mapping[str, np.ndarray]
Losses = dict[str, np.ndarray]


class Learner:
    """Decides with a policy, and runs its updates.

    Args:
        policy: with its losses and updates, see `methods.off_policy.algorithm`; its weights are trained in place.
        settings: the `train` node of the configuration.
        data: the buffers, as attributes `online` and `offline`.
    """

    def __init__(self, policy: Any, settings: Settings, data: Any):
        self.policy, self.settings, self.data = policy, settings, data
        self.fast = bool(settings.get("fast", True))
        policy.fast = self.fast
        policy.dealt = self.fast and _side_by_side(policy)
        self.xla = self.fast and not policy.dealt
        self.precision = _precision(settings.get("precision"), self.xla)
        self.parts: dict[str, Part] = policy.parts(settings)
        self.optimizers = self._optimizers()
        self._programs: dict[tuple[str, bool], Callable[..., tf.Tensor]] = {}
        self._names: dict[tuple[str, bool], tuple[str, ...]] = {}
        self._act = tf.function(self._decide, jit_compile=self.fast, autograph=False)

    def _optimizers(self) -> OptimizerGroup:
        settings, optimizers, schedules, fused = self.settings, {}, {}, not self.xla and self.fast
        for name, part in self.parts.items():
            if part.constant:
                optimizers[name] = AdamW(part.variables, settings[f"{part.prefix}lr"], fused=fused)
                continue
            schedules[name] = CosineWarmupRestarts.of(settings, part.prefix)
            decay = settings[f"{part.prefix}weight_decay"]
            optimizers[name] = AdamW(part.variables, schedules[name].lr, decay, fused=fused)
        return OptimizerGroup(optimizers, schedules)

    @property
    def learning_rates(self) -> dict[str, float]:
        """Returns the present rates by part."""
        return self.optimizers.learning_rates

    def end_iteration(self) -> None:
        """Advances the learning-rate schedules."""
        self.optimizers.advance()

    # ---------- acting ----------

    def act(self, state: np.ndarray, rng: Rng, deterministic: bool) -> np.ndarray:
        """Decides on action chunks [E,H,A] for observations [E,To,O], with draws from `rng`."""
        draws = self.policy.draw_action(rng, len(state), deterministic, self.settings)
        decided = self._act(tf.constant(state, self.policy.dtype), _tensors(draws), deterministic)
        if not isinstance(decided, tuple):
            return decided.numpy()
        candidates, weights = (tensor.numpy() for tensor in decided)
        return candidates[np.arange(len(candidates)), rng.choose(weights)]

    def _decide(self, state: tf.Tensor, draws: dict[str, tf.Tensor], deterministic: bool) -> Any:
        return self.policy.act({"state": state}, draws, deterministic, self.settings)

    # ---------- updating ----------

    def run(self, phase: Phase, rng: Rng, rows: Any, after: Callable[[int, Losses], None]) -> Losses:
        """Runs all updates of a phase; `after(number, losses)` is called after each compiled call.

        Args:
            rng: the source of all draws.
            rows: draws rows of the buffers, `rows.online(n)` and `rows.offline(n)`.

        Returns:
            by name the losses [n] of the updates.
        """
        losses: list[Losses] = []
        done = 0
        together = min(phase.n, UPDATES_PER_CALL)
        while done < phase.n:
            count = together if phase.n - done >= together else 1
            draw = getattr(self.policy, phase.draw)
            drawn = [draw(rng, rows, self.settings, phase.train_actor) for _ in range(count)]
            losses.append(self._call(phase, drawn))
            done += count
            after(count, losses[-1])
        return {name: np.concatenate([call[name] for call in losses]) for name in (losses[0] if losses else ())}

    def _call(self, phase: Phase, drawn: Sequence[Draws]) -> Losses:
        key = phase.update, phase.train_actor
        if key not in self._programs:
            self._programs[key] = tf.function(self._loop(phase), jit_compile=self.xla and replicas.count() == 1)
        stacked = {name: np.stack([draws[name] for draws in drawn]) for name in drawn[0]}
        losses = self._programs[key](_tensors(stacked)).numpy()
        return {name: losses[:, i] for i, name in enumerate(self._names[key])}

    def _loop(self, phase: Phase) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
        update = tf.autograph.experimental.do_not_convert(getattr(self.policy, phase.update))

        def loop(draws: dict[str, tf.Tensor]) -> tf.Tensor:
            n = next(iter(draws.values())).shape[0]
            losses = tf.TensorArray(self.policy.dtype, size=n, element_shape=[MOST_LOSSES])
            for u in tf.range(n):
                one = {name: draw[u] for name, draw in draws.items()}
                with backward_in(self.precision, forward=True):
                    results = update(self.data, one, self.optimizers, self.settings, phase.train_actor)
                self._note(phase, results)
                values = tf.stack([tf.cast(v, self.policy.dtype) for v in results.values()])
                losses = losses.write(u, tf.pad(values, [[0, MOST_LOSSES - len(results)]]))
            return losses.stack()

        return loop

    def _note(self, phase: Phase, losses: Mapping[str, tf.Tensor]) -> None:
        """Notes, while a program is traced, which losses it will return."""
        self._names[phase.update, phase.train_actor] = tuple(losses)

    # ---------- state ----------

    def _apart(self) -> dict[str, tf.Variable]:
        """Returns what is trained but is not in the policy's state_dict."""
        known = {id(parameter.variable) for parameter in named_parameters(self.policy)}
        return {
            f"train.{name}.{i}": variable
            for name, part in self.parts.items()
            for i, variable in enumerate(part.variables)
            if id(variable) not in known
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns the optimizers' moments, and what the policy's state_dict leaves out."""
        return {name: variable.numpy() for name, variable in self._apart().items()} | self.optimizers.tensors()

    def state(self) -> dict[str, Any]:
        """Returns where the schedules stand, as JSON values."""
        return self.optimizers.state()

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Takes back what `tensors` and `state` returned."""
        for name, variable in self._apart().items():
            variable.assign(tensors[name])
        self.optimizers.restore(tensors, state)


def _side_by_side(policy: Any) -> bool:
    """Returns whether a policy's updates are a plain graph, whose operations run side by side, one thread each."""
    return bool(getattr(policy, "SIDE_BY_SIDE", False)) and not has_gpu()


def _precision(asked: str | None, xla: bool) -> str | None:
    """Returns the precision of products; on a processor XLA's are no faster in bfloat16, so that they stay as they are,
    and a line says so."""
    if asked == HALF and xla and not has_gpu():
        log.warning("train.precision=bfloat16: changes nothing for this algorithm on a processor; computing in float32")
        return None
    return asked


def _tensors(draws: Mapping[str, np.ndarray]) -> dict[str, tf.Tensor]:
    return {name: tf.constant(np.asarray(v, np.int32) if v.dtype.kind == "i" else v) for name, v in draws.items()}
