"""The optimizers of a model's parts and their learning-rate schedules as one object: step, advance, save, restore."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.core.optimizers import AdamW, GradientSteps


class OptimizerGroup(GradientSteps):
    """AdamW for each part of a model; calling the group takes a step of one part.

    Args:
        optimizers: by the part's name.
        schedules: by the part's name; a part without one keeps its learning rate.
    """

    def __init__(self, optimizers: Mapping[str, AdamW], schedules: Mapping[str, CosineWarmupRestarts]):
        super().__init__(optimizers)
        self.schedules = schedules

    @property
    def learning_rates(self) -> dict[str, float]:
        """The present rates by the part's name."""
        return {name: float(optimizer.learning_rate.numpy()) for name, optimizer in self.optimizers.items()}

    def apply(self, name: str, grads: Sequence[tf.Tensor | None]) -> None:
        """Take a step of one part with gradients that are known already. Graph-safe."""
        self.optimizers[name].apply(grads)

    def advance(self, names: Collection[str] | None = None) -> None:
        """Go on to the next iteration's learning rates, of these parts only (None: of all)."""
        for name, schedule in self.schedules.items():
            if names is None or name in names:
                self.optimizers[name].learning_rate.assign(schedule.step())

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the moments as `optimizer.<part>.<name>`, for a checkpoint."""
        return {
            f"optimizer.{part}.{name}": np.asarray(value)
            for part, optimizer in self.optimizers.items()
            for name, value in optimizer.state().items()
        }

    def state(self) -> dict[str, Any]:
        """Return where the schedules stand, as JSON values."""
        return {"schedules": {name: schedule.state() for name, schedule in self.schedules.items()}}

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Take back what `tensors` and `state` returned; schedules that were changed since take effect at once."""
        for name, optimizer in self.optimizers.items():
            prefix = f"optimizer.{name}."
            optimizer.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, schedule in self.schedules.items():
            schedule.restore(state["schedules"][name])
            self.optimizers[name].learning_rate.assign(schedule.lr)
