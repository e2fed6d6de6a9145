"""The training loop of Diffuser's models: batches, averages, log lines, pictures of samples, labels of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.typing import Rng
from diffusion_rl.data.trajectories import TrajectoryDataset
from diffusion_rl.data.windows import WindowOrder
from diffusion_rl.interop.torch_names import named_parameters
from diffusion_rl.methods.diffuser.files import normalizer_tensors
from diffusion_rl.methods.diffuser.options import Options
from diffusion_rl.methods.diffuser.trainer import DiffuserTrainer, MicroBatch
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.loop import Losses, State, TrainingLoop, part_tensors, restore_parts, restore_rng, rng_state
from diffusion_rl.training.run_dir import Nowhere, RunDir

STEPS_PER_CALL = 10  # of the compiled training function
DECAYED = 0.1  # of the learning rate
PICTURES = 2  # of samples, whenever such are due


@dataclass(frozen=True)
class DiffuserSettings:
    """How long a model is trained, on what at a time, and what is due when.

    Attributes:
        n_train_steps, save_freq, label_freq, log_freq, sample_freq: all in steps; a checkpoint saved at step s is
            called after the last multiple of `label_freq`, so later ones take the place of earlier ones.
        batch_size, gradient_accumulate_every: windows of a micro-batch, micro-batches of a step.
        n_reference, n_samples: windows of the picture of the data, samples of one of samples.
        lr_decay_steps: so many last steps have a tenth of the trainer's learning rate.
    """

    n_train_steps: int
    save_freq: int
    label_freq: int
    log_freq: int = 100
    sample_freq: int = 0
    batch_size: int = 32
    gradient_accumulate_every: int = 2
    n_reference: int = 8
    n_samples: int = 2
    lr_decay_steps: int = 0

    @classmethod
    def of(cls, options: Options) -> DiffuserSettings:
        """Returns what the options of an experiment ask for."""
        same = ("save_freq", "sample_freq", "batch_size", "gradient_accumulate_every", "n_reference", "lr_decay_steps")
        return cls(
            n_train_steps=int(options.n_train_steps),
            label_freq=max(int(options.n_train_steps // options.n_saves), 1),
            n_samples=getattr(options, "n_samples", cls.n_samples),
            **{name: getattr(options, name) for name in same},
        )


class DiffuserTraining(TrainingLoop):
    """Trains a model on a data set.

    Args:
        trainer: steps of training.
        rng: the source of all draws.
        run_dir: where everything goes.
        renderer: draws pictures (`pictures.Renderer.composite`); None: no pictures.
        picture_rng: the source of what they show, so that training's draws are those of a run without; None: `rng`.
        merge: the micro-batches of a step as one batch, which gives the same gradient in less time.
        observer: called after every compiled call with the last step's number, the losses and the other results.
    """

    CURE = "lower --learning_rate"

    def __init__(
        self,
        trainer: DiffuserTrainer,
        dataset: TrajectoryDataset,
        rng: Rng,
        settings: DiffuserSettings,
        *,
        run_dir: RunDir | Nowhere | None = None,
        renderer: Any = None,
        picture_rng: Rng | None = None,
        merge: bool = True,
        observer: Callable[[int, np.ndarray, dict[str, np.ndarray]], None] | None = None,
    ):
        self.trainer, self.dataset, self.rng, self.settings = trainer, dataset, rng, settings
        self.windows = WindowOrder(len(dataset), settings.batch_size, rng)
        self.picture_rng = picture_rng or rng
        self.shown = WindowOrder(len(dataset), 1, self.picture_rng)
        self.total, self.run_dir = settings.n_train_steps, run_dir or Nowhere()
        self.renderer, self.merge, self.observer = renderer, merge, observer
        self.learning_rate, self.decays_at = (
            trainer.optimizer.learning_rate.numpy(),
            self.total - settings.lr_decay_steps,
        )
        model: Any = trainer.ema_model
        self._sample: Any = None if renderer is None else tf.function(model.sample, autograph=False)
        self._row: dict[str, Any] = {}

    # ---------- the loop ----------

    def advance(self, end: int) -> tuple[int, Losses]:
        """Trains up to where something is due after a step, or enough steps are together."""
        count = next(n for n in range(1, end - self.step + 1) if self._ends(n, end))
        factor = DECAYED if self.step >= self.decays_at else 1.0
        self.trainer.optimizer.learning_rate.assign(self.learning_rate * factor)
        losses, infos = self._steps(count)
        self.check_finite({"the loss": losses}, self.step + count - 1)
        self._after(self.step + count - 1, losses, infos)
        return count, {}

    @property
    def number(self) -> int:
        return self.step - 1

    def label(self, keep: bool) -> int:
        """Names a checkpoint that stays: see `label_freq`; at the end of the training or of a phase by the step."""
        at_end = self.step in (self.total, self.run_dir.stop_at)
        return self.number // self.settings.label_freq * self.settings.label_freq if keep and not at_end else self.step

    def due(self, what: str) -> bool:
        return self.number % (self.settings.log_freq if what == "log" else self.settings.save_freq) == 0

    def row(self) -> dict[str, Any]:
        return {"itr": self.number, "kind": "train", **self._row}

    def _ends(self, n: int, end: int) -> bool:
        """Returns whether n steps from here are a call: something is due after the last, or enough are together."""
        last, s = self.step + n - 1, self.settings
        due = any(every and last % every == 0 for every in (s.save_freq, s.log_freq, s.sample_freq))
        return due or n == STEPS_PER_CALL or last + 1 in (end, self.decays_at)

    def _steps(self, count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Trains `count` steps; results [n] of each step, or of each micro-batch where these are not merged."""
        steps = [self._draw() for _ in range(count)]
        results, alike, first = [], list[MicroBatch](), self.step
        for number, micro_batches in enumerate(steps, start=self.step):
            if self.merge and all(len(batch[0]) == self.windows.size for batch in micro_batches):
                alike.append(_joined(micro_batches))
                continue
            if alike:
                results.append(self.trainer.steps(alike, first))
            results.append(self.trainer.step(micro_batches, number))
            alike, first = [], number + 1
        if alike:
            results.append(self.trainer.steps(alike, first))
        losses = np.concatenate([losses for losses, _ in results])
        return losses, {name: np.concatenate([infos[name] for _, infos in results]) for name in self.trainer.names}

    def _draw(self) -> list[MicroBatch]:
        """Draws the micro-batches of one step; step by step, so a run in pieces has the same."""
        model, batches = self.trainer.model, []
        for _ in range(self.settings.gradient_accumulate_every):
            items = next(self.windows)
            t = self.rng.integers(0, model.n_timesteps, (len(items),))
            batches.append((items, t, self.rng.normal((len(items), model.horizon, model.transition_dim))))
        return batches

    def _after(self, step: int, losses: np.ndarray, infos: dict[str, np.ndarray]) -> None:
        """Keeps the last step's mean over micro-batches (the reference prints half of the last's); draws pictures."""
        n = 1 if self.merge else self.settings.gradient_accumulate_every
        self._row = {"loss": float(np.mean(losses[-n:]))} | {k: float(np.mean(v[-n:])) for k, v in infos.items()}
        if self.observer is not None:
            self.observer(step, losses, infos)
        if self.renderer is not None and self.settings.sample_freq:
            if step == 0:
                self._render_reference()
            if step % self.settings.sample_freq == 0:
                self._render_samples(step)

    # ---------- pictures ----------

    def _render_reference(self) -> None:
        items = self.picture_rng.permutation(len(self.dataset))[: self.settings.n_reference]
        if len(items):
            self._composite("_sample-reference.png", self.dataset.trajectories(items))

    def _render_samples(self, step: int) -> None:
        model, n_samples = self.trainer.ema_model, self.settings.n_samples
        shape = (model.n_timesteps + 1, n_samples, model.horizon, model.transition_dim)
        for i in range(PICTURES):
            item = np.repeat(next(self.shown), n_samples)
            known = tf.nest.map_structure(
                lambda o: tf.constant(o, None if o.dtype == np.uint8 else model.dtype), self.dataset.conditions(item)
            )
            samples = self._sample(known, tf.constant(self.picture_rng.normal(shape), model.dtype)).trajectories.numpy()
            self._composite(f"sample-{step}-{i}.png", samples, before=self.dataset.trajectories(item)[:, :1])

    def _composite(self, name: str, trajectories: np.ndarray, before: np.ndarray | None = None) -> None:
        """Draws trajectories [n,H,D] or actions alone [n,H,A], with the transitions [n,1,D] before them."""
        width, normalizers = self.dataset.action_dim, self.dataset.normalizers
        known = trajectories[..., width:] if trajectories.shape[-1] > width else trajectories[:, :0, :0]
        if before is not None:
            known = np.concatenate([before[..., width:]] + [known] * bool(known.size), axis=1)
        observations = normalizers["observations"].unnormalize(known)
        self.renderer.composite(name, observations, normalizers["actions"].unnormalize(trajectories[..., :width]))

    # ---------- state ----------

    def parts(self) -> dict[str, Any]:
        """Returns networks and optimizer under their names in checkpoints."""
        trainer = self.trainer
        return {"model": trainer.model, "ema": trainer.ema_model, "optimizer.network": trainer.optimizer}

    def state(self) -> State:
        """Returns weights, their average, the optimizer, and everything that decides on the next step."""
        tensors = part_tensors(self.parts())
        tensors |= {"train.order": self.windows.order, "train.shown": self.shown.order}
        tensors |= normalizer_tensors(self.dataset)
        state: dict[str, Any] = {"position": self.windows.position, "shown": self.shown.position}
        state |= {"noise": rng_state(self.rng), "pictures": rng_state(self.picture_rng)}
        return tensors, {"step": self.step, "train": state}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on where `state` was taken."""
        state = checkpoint.metadata["train"]
        restore_parts(self.parts(), checkpoint)  # but not the learning rate: `advance` sets that
        self.windows.order, self.windows.position = checkpoint.tensors["train.order"], int(state["position"])
        self.shown.order, self.shown.position = checkpoint.tensors["train.shown"], int(state["shown"])
        restore_rng(self.rng, state["noise"])
        if "pictures" in state:  # not in checkpoints from before there were any
            restore_rng(self.picture_rng, state["pictures"])
        self.step = int(checkpoint.metadata["step"])

    def report(self) -> Iterator[str]:
        """Returns lines on the size of the network: the whole and the ten largest parts."""
        sizes = {p.name: math.prod(p.variable.shape) for p in named_parameters(self.trainer.model)}
        yield f"parameters: {sum(sizes.values()):,}"
        largest = sorted(sizes.items(), key=lambda item: -item[1])
        for name, size in largest[:10]:
            yield f"    {name:<48} {size:>10,}"
        if len(largest) > 10:
            yield f"    and {len(largest) - 10} more with {sum(size for _, size in largest[10:]):,}"

    def check(self) -> None:
        """Computes a loss and its gradients, before anything is written: what does not fit together fails here."""
        model, item = self.trainer.model, np.zeros(1, np.int64)
        shape = (1, model.horizon, model.transition_dim)
        with tf.GradientTape() as tape:
            loss, _ = self.trainer.loss(tf.constant(item, tf.int32), tf.constant(item), tf.zeros(shape, model.dtype))
        if any(grad is None for grad in tape.gradient(loss, self.trainer.variables)):
            raise UserError("part of the network is not trained by its loss: check model and diffusion")


def _joined(batches: list[MicroBatch]) -> MicroBatch:
    items, t, noise = (np.concatenate(column) for column in zip(*batches, strict=True))
    return items, t, noise
