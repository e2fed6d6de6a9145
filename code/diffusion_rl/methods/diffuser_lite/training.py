"""DiffuserLite's loops: training, data for the reflow, the reflow itself, and Q-learning."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.typing import Rng
from diffusion_rl.data.plan_windows import PlanDataset
from diffusion_rl.data.windows import WindowOrder
from diffusion_rl.diffusion.rectified_flow import time_grid
from diffusion_rl.methods.diffuser_lite.iql import IQLTrainer
from diffusion_rl.methods.diffuser_lite.levels import PlanLevel
from diffusion_rl.methods.diffuser_lite.trainer import (
    LevelDraws,
    LevelTrainer,
    LiteTrainer,
    ReflowTrainer,
    cosine_rate,
)
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.loop import Losses, State, TrainingLoop, part_tensors, restore_parts, restore_rng, rng_state
from diffusion_rl.training.run_dir import Nowhere, RunDir

STEPS_PER_CALL = 10  # of the compiled training function
UNCONDITIONAL_EVERY = 5  # reflow: every so many updates one of the unconditional model


class LiteLoop(TrainingLoop):
    """Averages losses between log lines.

    Args:
        names: of the losses.
        rng: the source of all draws.
        steps: of the whole training, however often it is interrupted.
        log_interval, save_interval: in steps.
        run_dir: where everything goes.
        record: called with every log line, {name: mean, "gradient_steps": step}.
    """

    windows: Any = None  # `WindowOrder` in which the data are gone through

    def __init__(
        self,
        names: Sequence[str],
        rng: Rng,
        *,
        steps: int,
        log_interval: int,
        save_interval: int,
        run_dir: RunDir | Nowhere | None = None,
        record: Callable[[dict[str, Any]], None] = lambda row: None,
    ):
        self.names, self.rng, self.total = list(names), rng, steps
        self.log_interval, self.save_interval, self.record = log_interval, save_interval, record
        self.run_dir = run_dir or Nowhere()
        self.sums = np.zeros(len(self.names))  # of the losses since the last log line
        self.observed: list[np.ndarray] | None = None  # keeps every update's losses where it is a list

    def advance(self, end: int) -> tuple[int, Losses]:
        """Updates up to where something is due."""
        stops = [every - self.step % every for every in (self.log_interval, self.save_interval)]
        losses = self.updates(min(*stops, end - self.step, STEPS_PER_CALL))
        if self.observed is not None:
            self.observed.extend(losses)
        self.sums[: losses.shape[1]] += losses.sum(axis=0, dtype=np.float64)
        return len(losses), {"a loss": losses}

    def due(self, what: str) -> bool:
        return self.step % (self.log_interval if what == "log" else self.save_interval) == 0

    def row(self) -> dict[str, Any]:
        """Returns the means since the last row; "loss" is that of all but the inverse dynamics."""
        means = dict(zip(self.names, (self.sums / self.log_interval).tolist(), strict=True))
        self.sums[:] = 0
        main = [value for name, value in means.items() if name.startswith("loss")]
        self.record({**means, "gradient_steps": self.step})
        return {"itr": self.step, "kind": "train", "loss": float(np.mean(main)), **means}

    def visible(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return super().visible({name: value for name, value in row.items() if name != "loss"})

    @abstractmethod
    def updates(self, count: int) -> np.ndarray:
        """Makes `count` updates; returns losses [count, names], of which the last names may be missing."""

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """Returns networks and optimizers under their names in states."""

    def state(self) -> State:
        tensors = {"train.sums": self.sums.copy(), **part_tensors(self.parts())}
        facts = {"step": self.step, "steps": self.total, "noise": rng_state(self.rng)}
        if self.windows is not None:
            tensors["train.order"], facts["position"] = self.windows.order, self.windows.position
        return tensors, facts

    def restore(self, checkpoint: Checkpoint) -> None:
        restore_parts(self.parts(), checkpoint)
        self.sums = checkpoint.tensors["train.sums"].copy()
        restore_rng(self.rng, checkpoint.metadata["noise"])
        if self.windows is not None:
            self.windows.order = checkpoint.tensors["train.order"]
            self.windows.position = int(checkpoint.metadata["position"])
        self.step = int(checkpoint.metadata["step"])


def level_parts(levels: Sequence[LevelTrainer]) -> dict[str, Any]:
    """Returns networks and optimizers of the levels."""
    parts: dict[str, Any] = {}
    for i, trainer in enumerate(levels):
        parts |= {f"level{i}.model": trainer.level.network, f"level{i}.model_ema": trainer.level.ema}
        parts |= {f"level{i}.optimizer.{name}": optimizer for name, optimizer in trainer.optimizers.items()}
    return parts


def draw_level(rng: Rng, level: PlanLevel, batch: int, with_noise: bool = True, with_drop: bool = True) -> LevelDraws:
    """Draws what an update of a level needs, in the reference's order."""
    states = rng.normal((batch, *level.shape)) if with_noise else np.zeros((batch, 0))
    return LevelDraws(states, rng.uniform((batch,)), rng.uniform((batch,)) if with_drop else np.zeros(batch))


class PlanTraining(LiteLoop):
    """Levels and inverse dynamics on a data set; the learning rate falls to 0 along a cosine over all steps.

    Args:
        trainer, inverse: updates; `trainer.inverse` is trained for the first `invdyn_steps` steps.
        data: whose windows are drawn.
        rate: of the levels, at first.
    """

    windows: WindowOrder

    def __init__(
        self,
        trainer: LiteTrainer,
        data: PlanDataset,
        rng: Rng,
        *,
        batch_size: int,
        rate: float,
        invdyn_steps: int,
        **options: Any,
    ):
        names = [f"loss{i}" for i in range(len(trainer.levels))]
        super().__init__([*names, "invdyn_loss"], rng, **options)
        assert trainer.inverse is not None
        self.trainer, self.data, self.rate, self.invdyn_steps = trainer, data, rate, invdyn_steps
        self.inverse = trainer.inverse
        self.windows = WindowOrder(len(data), batch_size, rng)

    def updates(self, count: int) -> np.ndarray:
        """Makes updates on batches of one size that train the same: ends early where the next one differs."""
        with_inverse = self.step < self.invdyn_steps
        if with_inverse:
            count = min(count, self.invdyn_steps - self.step)
        items, draws, kept, rates = [], [], [], []
        for number in range(self.step, self.step + count):
            batch = next(self.windows)
            items.append(self.data.at(batch))
            draws.append([draw_level(self.rng, trainer.level, len(batch)) for trainer in self.trainer.levels])
            if with_inverse:
                kept.append(self._dropout(len(batch)))
            rates.append(cosine_rate(self.rate, number, self.total))
            if self._next_size() != len(batch):
                break
        stacked = [LevelDraws(*map(np.stack, zip(*level, strict=True))) for level in zip(*draws, strict=True)]
        return self.trainer.steps(np.stack(items), stacked, np.stack(kept) if kept else None, rates)

    def _dropout(self, batch: int) -> np.ndarray:
        inverse = self.inverse.inverse
        pairs = self.trainer.levels[-1].level.shape[0] - 1
        return self.rng.uniform((batch, pairs, inverse.hidden_dim)) >= inverse.dropout

    def _next_size(self) -> int:
        left = len(self.windows.order) - self.windows.position
        return min(left if left > 0 else self.windows.count, self.windows.size)

    def parts(self) -> dict[str, Any]:
        inverse = {"invdyn.model": self.inverse.inverse, "invdyn.optimizer": self.inverse.optimizer}
        return level_parts(self.trainer.levels) | inverse


class Pairs:
    """What the reflow learns from: plans that were generated, and the noise each came from.

    `conditional` and `unconditional` of each level [N,2,H,O] (plan, noise), `returns` of each level [N,1]: arrays, or
    data sets of an HDF5 file.
    """

    def __init__(self, conditional: Sequence[Any], returns: Sequence[Any], unconditional: Sequence[Any]):
        self.conditional, self.returns, self.unconditional = conditional, returns, unconditional


class Reflow(LiteLoop):
    """Straightens the flow: the levels are trained on pairs, every fifth update without returns, at a constant rate."""

    def __init__(self, trainer: ReflowTrainer, pairs: Pairs, rng: Rng, *, batch_size: int, rate: float, **options: Any):
        super().__init__([f"loss{i}" for i in range(len(trainer.levels))], rng, **options)
        self.trainer, self.pairs, self.batch_size, self.rate = trainer, pairs, batch_size, rate

    def updates(self, count: int) -> np.ndarray:
        return np.array([self._one(number) for number in range(self.step, self.step + count)])

    def _one(self, number: int) -> list[float]:
        conditional = number % UNCONDITIONAL_EVERY != 0
        drawn, draws = list[tuple[np.ndarray, np.ndarray | None]](), []
        for i, trainer in enumerate(self.trainer.levels):
            source = self.pairs.conditional[i] if conditional else self.pairs.unconditional[i]
            rows = self.rng.integers(0, len(source), (self.batch_size,))
            drawn.append((_take(source, rows), _take(self.pairs.returns[i], rows) if conditional else None))
            draws.append(draw_level(self.rng, trainer.level, self.batch_size, False, conditional))
        return self.trainer.step(drawn, draws, self.rate)

    def parts(self) -> dict[str, Any]:
        return level_parts(self.trainer.levels)


def _take(source: Any, rows: np.ndarray) -> np.ndarray:
    """Takes rows of an array, or of a data set on disk, which gives them in ascending order and each only once."""
    if isinstance(source, np.ndarray):
        return source[rows].astype(np.float32)
    unique, back = np.unique(rows, return_inverse=True)
    return source[unique][back].astype(np.float32)


class Generation:
    """Generates the reflow's pairs in the order of the data, again and again until there are enough.

    Args:
        levels: whose averaged weights generate.
        plans: gives states [B,H,O] and returns [B,1] of windows [B] of a level.
        steps: denoising steps.
    """

    def __init__(self, levels: Sequence[PlanLevel], data: PlanDataset, plans: Callable, batch_size: int, steps: int):
        self.levels, self.data, self.plans, self.batch_size = levels, data, plans, min(batch_size, len(data))
        self.grid = time_grid(steps)
        self._compiled = functools.cache(self._compile)

    def _compile(self, number: int, guidance: float) -> Callable[..., Any]:
        level = self.levels[number]

        def sample(noise: Any, known: Any, returns: Any) -> Any:
            return level.sample(noise, known, self.grid, returns, guidance)

        plans = tf.TensorSpec([self.batch_size, *level.shape], level.dtype)
        returns = tf.TensorSpec([self.batch_size, 1], level.dtype)
        return tf.function(sample, autograph=False).get_concrete_function(plans, plans, returns)

    def run(
        self,
        rng: Rng,
        conditional: int,
        unconditional: int,
        write: Callable[[int, int, np.ndarray, np.ndarray | None], None],
        say: Callable[[str], None] = print,
    ) -> None:
        """Calls `write` with a level, the first row, pairs [B,2,H,O] and returns [B,1] (None: unconditional).

        Args:
            conditional, unconditional: how many pairs there shall be.
        """
        made, start = [0, 0], 0
        while made[0] < conditional or made[1] < unconditional:
            items = np.arange(start, start + self.batch_size)
            windows = self.data.at(items)
            sizes = [
                min(self.batch_size, most - done) for most, done in zip((conditional, unconditional), made, strict=True)
            ]
            for i, level in enumerate(self.levels):
                states, returns = self.plans(i, windows[i])
                for kind in (0, 1):
                    if sizes[kind] <= 0:
                        continue
                    drawn = tf.constant(rng.normal((self.batch_size, *level.shape)), level.dtype)
                    plans = self._compiled(i, 1.0 - kind)(drawn, states, returns)
                    pairs = np.stack([plans.numpy(), drawn.numpy()], axis=1)[: sizes[kind]]
                    write(i, made[kind], pairs, returns.numpy()[: sizes[kind]] if kind == 0 else None)
            made = [done + max(size, 0) for done, size in zip(made, sizes, strict=True)]
            start = start + self.batch_size if start + 2 * self.batch_size <= len(self.data) else 0
            shares = [100 * done / max(most, 1) for done, most in zip(made, (conditional, unconditional), strict=True)]
            say(f"cond: {shares[0]:.1f}%, uncon: {shares[1]:.1f}%")


class QLearning(LiteLoop):
    """Implicit Q-learning on transitions.

    Args:
        transitions: observations, actions, rewards, following observations, ends: [N,O], [N,A], [N,1], [N,O], [N,1].
    """

    windows: WindowOrder

    def __init__(
        self, trainer: IQLTrainer, transitions: Sequence[np.ndarray], rng: Rng, *, batch_size: int, **options: Any
    ):
        super().__init__(["loss_v", "loss_q"], rng, **options)
        self.trainer, self.transitions = trainer, list(transitions)
        self.windows = WindowOrder(len(self.transitions[0]), batch_size, rng)

    def updates(self, count: int) -> np.ndarray:
        return np.array([self._one() for _ in range(count)])

    def _one(self) -> list[float]:
        items = next(self.windows)
        batch = [tf.constant(column[items]) for column in self.transitions]
        return [float(loss) for loss in self.trainer.compiled(*batch)]

    def parts(self) -> dict[str, Any]:
        optimizers = {f"optimizer.{name}": optimizer for name, optimizer in self.trainer.optimizers.items()}
        return {"iql": self.trainer.iql, **optimizers}
