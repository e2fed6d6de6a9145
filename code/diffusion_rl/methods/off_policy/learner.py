"""Many updates of an off-policy algorithm in one compiled call, its optimizers, schedules and their state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.core.optimizers import AdamW, GradientSteps
from diffusion_rl.interop.torch_names import named_parameters
from diffusion_rl.methods.off_policy.algorithm import Part, Phase

UPDATES_PER_CALL = 32  # compiled together; what is left over goes one by one
MOST_LOSSES = 6  # that one update reports

Draws = Mapping[str, np.ndarray]
Losses = dict[str, np.ndarray]


class Learner:
    """Runs an algorithm's updates.

    Args:
        algorithm: see `methods.off_policy.algorithm`; its weights are trained in place.
        train: the `train` node of the configuration.
        data: the buffers, as attributes `online` and `offline`.
    """

    def __init__(self, algorithm: Any, train: Mapping[str, Any], data: Any):
        self.algorithm, self.train, self.data = algorithm, train, data
        self.fast = bool(train.get("fast", True))
        algorithm.fast = self.fast
        self.parts: dict[str, Part] = algorithm.parts(train)
        scheduled = {name: part.prefix for name, part in self.parts.items() if not part.constant}
        self.schedules = {name: CosineWarmupRestarts.of(train, prefix) for name, prefix in scheduled.items()}
        self.optimizers = {name: self._optimizer(name, part) for name, part in self.parts.items()}
        self.step = GradientSteps(self.optimizers)
        self._programs: dict[tuple[str, bool], Callable[..., tf.Tensor]] = {}
        self._names: dict[tuple[str, bool], tuple[str, ...]] = {}
        self._act = tf.function(self._decide, jit_compile=self.fast, autograph=False)

    def _optimizer(self, name: str, part: Part) -> AdamW:
        if part.constant:
            return AdamW(part.variables, self.train[f"{part.prefix}lr"])
        return AdamW(part.variables, self.schedules[name].lr, self.train[f"{part.prefix}weight_decay"])

    @property
    def learning_rates(self) -> dict[str, float]:
        """By part."""
        return {name: float(o.learning_rate.numpy()) for name, o in self.optimizers.items()}

    def end_iteration(self) -> None:
        """Advance the learning-rate schedules."""
        for name, schedule in self.schedules.items():
            self.optimizers[name].learning_rate.assign(schedule.step())

    # ---------- acting ----------

    def act(self, state: np.ndarray, noise: Any, deterministic: bool) -> np.ndarray:
        """Action chunks [E,H,A] for observations [E,To,O]; `noise` is the source."""
        draws = self.algorithm.draw_action(noise, len(state), deterministic, self.train)
        decided = self._act(tf.constant(state, self.algorithm.dtype), _tensors(draws), deterministic)
        if not isinstance(decided, tuple):
            return decided.numpy()
        candidates, weights = (each.numpy() for each in decided)
        return candidates[np.arange(len(candidates)), noise.choose(weights)]

    def _decide(self, state: tf.Tensor, draws: dict[str, tf.Tensor], deterministic: bool) -> Any:
        return self.algorithm.act({"state": state}, draws, deterministic, self.train)

    # ---------- updating ----------

    def run(self, phase: Phase, noise: Any, rows: Any, after: Callable[[int, Losses], None]) -> Losses:
        """All updates of a phase; `after(number, losses)` is called after each compiled call.

        Args:
            noise: the source of all draws.
            rows: draws rows of the buffers, `rows.online(n)` and `rows.offline(n)`.

        Returns:
            by name the losses [n] of the updates.
        """
        found: list[Losses] = []
        done = 0
        together = min(phase.n, UPDATES_PER_CALL)
        while done < phase.n:
            count = together if phase.n - done >= together else 1
            draw = getattr(self.algorithm, phase.draw)
            drawn = [draw(noise, rows, self.train, phase.train_actor) for _ in range(count)]
            found.append(self._call(phase, drawn))
            done += count
            after(count, found[-1])
        return {name: np.concatenate([losses[name] for losses in found]) for name in (found[0] if found else ())}

    def _call(self, phase: Phase, drawn: Sequence[Draws]) -> Losses:
        key = phase.update, phase.train_actor
        if key not in self._programs:
            self._programs[key] = tf.function(self._loop(phase), jit_compile=self.fast)
        stacked = {name: np.stack([draws[name] for draws in drawn]) for name in drawn[0]}
        losses = self._programs[key](_tensors(stacked)).numpy()
        return {name: losses[:, i] for i, name in enumerate(self._names[key])}

    def _loop(self, phase: Phase) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
        update = tf.autograph.experimental.do_not_convert(getattr(self.algorithm, phase.update))

        def loop(draws: dict[str, tf.Tensor]) -> tf.Tensor:
            n = next(iter(draws.values())).shape[0]
            losses = tf.TensorArray(self.algorithm.dtype, size=n, element_shape=[MOST_LOSSES])
            for u in tf.range(n):
                one = {name: draw[u] for name, draw in draws.items()}
                found = update(self.data, one, self.step, self.train, phase.train_actor)
                self._note(phase, found)
                values = tf.stack([tf.cast(v, self.algorithm.dtype) for v in found.values()])
                losses = losses.write(u, tf.pad(values, [[0, MOST_LOSSES - len(found)]]))
            return losses.stack()

        return loop

    def _note(self, phase: Phase, losses: Mapping[str, tf.Tensor]) -> None:
        """While a program is traced: which losses it will return."""
        self._names[phase.update, phase.train_actor] = tuple(losses)

    # ---------- state ----------

    def _apart(self) -> dict[str, tf.Variable]:
        """What is trained but is not in the model's state_dict."""
        known = {id(each.variable) for each in named_parameters(self.algorithm)}
        return {
            f"train.{name}.{i}": variable
            for name, part in self.parts.items()
            for i, variable in enumerate(part.variables)
            if id(variable) not in known
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """Optimizers, and what the model's state_dict leaves out."""
        tensors = {name: variable.numpy() for name, variable in self._apart().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= {f"optimizer.{name}.{k}": v for k, v in optimizer.state().items()}
        return {name: np.asarray(value) for name, value in tensors.items()}

    def state(self) -> dict[str, Any]:
        """Schedules."""
        return {"schedules": {name: schedule.state() for name, schedule in self.schedules.items()}}

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Inverse of `tensors` and `state`."""
        for name, variable in self._apart().items():
            variable.assign(tensors[name])
        for name, optimizer in self.optimizers.items():
            prefix = f"optimizer.{name}."
            optimizer.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, schedule in self.schedules.items():
            schedule.restore(state["schedules"][name])
            self.optimizers[name].learning_rate.assign(schedule.lr)


def _tensors(draws: Mapping[str, np.ndarray]) -> dict[str, tf.Tensor]:
    return {name: tf.constant(np.asarray(v, np.int32) if v.dtype.kind == "i" else v) for name, v in draws.items()}
