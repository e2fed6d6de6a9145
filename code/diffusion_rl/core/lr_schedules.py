"""Learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusion_rl.core.errors import UserError


class CosineWarmupRestarts:
    """Cosine annealing with linear warm-up and restarts (the schedule of the reference's `util/scheduler.py`).

    A newly built schedule stands at `min_lr` whatever the warm-up; `step()` is called at the END of each epoch or
    iteration, so the first one always runs at `min_lr`.

    Args:
        first_cycle_steps: length of the first cycle, warm-up included.
        cycle_mult: factor from one cycle's length (without warm-up) to the next one's.
        max_lr, min_lr: top and bottom of the first cycle.
        warmup_steps: linear steps from `min_lr` to the top.
        gamma: factor of the top per cycle.
    """

    def __init__(
        self,
        first_cycle_steps: int,
        cycle_mult: float = 1.0,
        max_lr: float = 0.1,
        min_lr: float = 0.001,
        warmup_steps: int = 0,
        gamma: float = 1.0,
    ):
        if warmup_steps >= first_cycle_steps:
            raise ValueError(f"warmup_steps={warmup_steps} must be smaller than first_cycle_steps={first_cycle_steps}")
        self.first_cycle_steps, self.cycle_mult = first_cycle_steps, cycle_mult
        self.base_max_lr, self.min_lr, self.warmup_steps, self.gamma = max_lr, min_lr, warmup_steps, gamma
        self.max_lr, self.cycle, self.epoch = max_lr, 0, 0
        self.step_in_cycle: float = 0
        self.cycle_steps: float = first_cycle_steps
        self.lr = min_lr

    @classmethod
    def of(cls, settings: Mapping[str, Any], prefix: str = "", rate: str = "lr") -> CosineWarmupRestarts:
        """Returns the schedule that `<prefix><rate>` and `<prefix>lr_scheduler` of the configuration's `train`
        describe.

        Raises UserError if the warm-up is as long as the cycle.
        """
        name = f"{prefix}lr_scheduler"
        cycle = settings[name]
        length, warmup = cycle["first_cycle_steps"], cycle["warmup_steps"]
        if warmup >= length:
            raise UserError(
                f"train.{name}.warmup_steps={warmup} is not smaller than train.{name}.first_cycle_steps={length} "
                "(in many configurations the number of iterations or epochs): train for longer or set "
                f"train.{name}.warmup_steps=0"
            )
        top = settings[prefix + rate]
        return cls(first_cycle_steps=length, max_lr=top, min_lr=cycle["min_lr"], warmup_steps=warmup)

    def step(self, epoch: int | None = None) -> float:
        """Advances by one, or jumps to `epoch`; returns the new rate."""
        if epoch is None:
            self.epoch += 1
            self.step_in_cycle += 1
            if self.step_in_cycle >= self.cycle_steps:
                self.cycle += 1
                self.step_in_cycle -= self.cycle_steps
                self.cycle_steps = int((self.cycle_steps - self.warmup_steps) * self.cycle_mult) + self.warmup_steps
        else:
            self._jump(epoch)
        self.max_lr = self.base_max_lr * self.gamma**self.cycle
        self.lr = self._rate()
        return self.lr

    def _jump(self, epoch: int) -> None:
        # Jumping uses other cycle lengths than stepping does (no warm-up added): the reference's behaviour.
        first, mult = self.first_cycle_steps, self.cycle_mult
        if epoch < first:
            self.cycle, self.step_in_cycle, self.cycle_steps = 0, epoch, first
        elif mult == 1.0:
            self.cycle, self.step_in_cycle, self.cycle_steps = epoch // first, epoch % first, first
        else:
            n = int(math.log(epoch / first * (mult - 1) + 1, mult))
            self.cycle = n
            self.step_in_cycle = epoch - int(first * (mult**n - 1) / (mult - 1))
            self.cycle_steps = first * mult**n
        self.epoch = math.floor(epoch)

    def _rate(self) -> float:
        if self.step_in_cycle < self.warmup_steps:
            return (self.max_lr - self.min_lr) * self.step_in_cycle / self.warmup_steps + self.min_lr
        progress = (self.step_in_cycle - self.warmup_steps) / (self.cycle_steps - self.warmup_steps)
        return self.min_lr + (self.max_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def state(self) -> dict[str, Any]:
        """Returns where the schedule stands, as JSON values."""
        return {k: getattr(self, k) for k in ("cycle", "cycle_steps", "step_in_cycle", "epoch", "max_lr", "lr")}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; settings that are others than then take effect at once."""
        for key, value in state.items():
            setattr(self, key, value)
        if self.cycle_mult == 1.0:
            self.cycle_steps = self.first_cycle_steps
        self.max_lr = self.base_max_lr * self.gamma**self.cycle
        self.lr = self._rate() if self.epoch else self.min_lr


def held(x: float, low: float, high: float, hold: int, fall: int, warmup: int = 0, cosine: bool = True) -> float:
    """Returns a value that rises from `low` to `high` in `warmup` steps, stays for `hold` and falls within `fall`.

    Args:
        x: the step.
        cosine: fall as half a cosine, else along a line.
    """
    if x < warmup:
        return low + (high - low) * x / warmup
    share = min(max((x - warmup - hold) / fall, 0.0), 1.0) if fall else 0.0
    return low + (high - low) * (0.5 * (1 + math.cos(math.pi * share)) if cosine else 1 - share)
