"""The training loop of Diffuser's models: batches, averages, log lines, checkpoints, pictures of samples, resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import Interrupted, UserError
from diffusion_rl.data.trajectories import TrajectoryDataset
from diffusion_rl.data.window_order import WindowOrder
from diffusion_rl.interop.torch_names import load_state_dict, named_parameters, state_dict
from diffusion_rl.methods.diffuser.trainer import DiffuserTrainer, MicroBatch
from diffusion_rl.training.checkpoint import Checkpoint, not_finite
from diffusion_rl.training.signals import StopRequest

STEPS_PER_CALL = 10  # of the compiled training function
DECAYED = 0.1  # of the learning rate
SAMPLES_DRAWN, PICTURES = 2, 2  # samples of a picture of samples, and how many such pictures


class DiffuserTraining:
    """Trains a model on a data set.

    Args:
        trainer: steps of training.
        noise: the source of all draws.
        batch_size, gradient_accumulate_every: windows of a micro-batch, micro-batches of a step.
        n_train_steps, save_freq, label_freq, log_freq, sample_freq: all in steps; a checkpoint saved at step s is
            called after the last multiple of `label_freq`, so later ones take the place of earlier ones.
        n_reference: windows of the picture of the data.
        lr_decay_steps: so many last steps have a tenth of the trainer's learning rate.
        save: writes a checkpoint, given (label, tensors, metadata).
        say: prints a line.
        renderer: draws pictures, `composite(name, observations [n,H,O])`; None: no pictures.
        merge: the micro-batches of a step as one batch, which gives the same gradient in less time.
        observer: called after every compiled call with the last step's number, the losses and the other results.
    """

    def __init__(
        self,
        trainer: DiffuserTrainer,
        dataset: TrajectoryDataset,
        noise: Any,
        *,
        batch_size: int = 32,
        gradient_accumulate_every: int = 2,
        n_train_steps: int,
        save_freq: int,
        label_freq: int,
        log_freq: int = 100,
        sample_freq: int = 0,
        n_reference: int = 8,
        lr_decay_steps: int = 0,
        save: Callable[[int, dict[str, np.ndarray], dict[str, Any]], None],
        say: Callable[[str], None] = print,
        record: Callable[[Mapping[str, Any]], None] = lambda row: None,
        renderer: Any = None,
        merge: bool = True,
        observer: Callable[[int, np.ndarray, dict[str, np.ndarray]], None] | None = None,
    ):
        self.trainer, self.dataset, self.noise = trainer, dataset, noise
        self.windows = WindowOrder(len(dataset), batch_size, noise)
        self.shown = WindowOrder(len(dataset), 1, noise)
        self.accumulate, self.n_train_steps, self.n_reference = gradient_accumulate_every, n_train_steps, n_reference
        self.save_freq, self.label_freq, self.log_freq, self.sample_freq = save_freq, label_freq, log_freq, sample_freq
        self.save_to, self.say, self.record = save, say, record
        self.renderer, self.merge, self.observer = renderer, merge, observer
        self.learning_rate, self.decays_at = trainer.optimizer.learning_rate.numpy(), n_train_steps - lr_decay_steps
        self.step = 0  # the next one
        self.stop = StopRequest()
        model: Any = trainer.ema_model  # values are not sampled
        self._sample: Any = tf.function(model.sample, autograph=False) if sample_freq else None
        self._began = time.monotonic()

    # ---------- the loop ----------

    def run(self, until: int | None = None) -> None:
        """Train to the end (or up to a step), or to SIGINT or SIGTERM, which saves and raises `Interrupted`."""
        end = self.n_train_steps if until is None else min(until, self.n_train_steps)
        with self.stop:
            while self.step < end:
                count = next(n for n in range(1, end - self.step + 1) if self._ends(n, end))
                factor = DECAYED if self.step >= self.decays_at else 1.0
                self.trainer.optimizer.learning_rate.assign(self.learning_rate * factor)
                losses, infos = self._steps(count)
                last = self.step + count - 1
                if not np.isfinite(losses).all():
                    raise UserError(f"the loss became {losses[-1]} at step {last}: lower --learning_rate")
                if self.observer is not None:
                    self.observer(last, losses, infos)
                self.step = last + 1
                self._after(last, losses, infos)
                if self.step == self.n_train_steps:
                    self._save(self.n_train_steps)
                self.stop_if_requested()

    def stop_if_requested(self) -> None:
        """If SIGINT or SIGTERM has arrived: save and end with `Interrupted`."""
        if self.stop.name is None:
            return
        if self.step == 0:
            raise Interrupted(f"stopped by {self.stop.name} before there was anything to save; start again")
        if self.step < self.n_train_steps:  # the end has been saved
            self._save(self._label(self.step - 1))
        raise Interrupted(f"stopped by {self.stop.name}; state saved; go on with --resume True")

    def _ends(self, n: int, end: int) -> bool:
        """Whether n steps from here are a call: something is due after the last, or enough are together."""
        last = self.step + n - 1
        due = any(every and last % every == 0 for every in (self.save_freq, self.log_freq, self.sample_freq))
        return due or n == STEPS_PER_CALL or last + 1 in (end, self.decays_at)

    def _steps(self, count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Train `count` steps; results [n] of each step, or of each micro-batch where these are not merged."""
        steps = [self._draw() for _ in range(count)]
        found, alike, first = [], list[MicroBatch](), self.step
        for number, micro_batches in enumerate(steps, start=self.step):
            if self.merge and all(len(batch[0]) == self.windows.size for batch in micro_batches):
                alike.append(_joined(micro_batches))
                continue
            if alike:
                found.append(self.trainer.steps(alike, first))
            found.append(self.trainer.step(micro_batches, number))
            alike, first = [], number + 1
        if alike:
            found.append(self.trainer.steps(alike, first))
        losses = np.concatenate([losses for losses, _ in found])
        return losses, {name: np.concatenate([infos[name] for _, infos in found]) for name in self.trainer.names}

    def _draw(self) -> list[MicroBatch]:
        """The micro-batches of one step. Draws are made step by step, so a run that is resumed has the same."""
        model, batches = self.trainer.model, []
        for _ in range(self.accumulate):
            items = next(self.windows)
            t = self.noise.integers(0, model.n_timesteps, (len(items),))
            batches.append((items, t, self.noise.normal((len(items), model.horizon, model.transition_dim))))
        return batches

    def _after(self, step: int, losses: np.ndarray, infos: dict[str, np.ndarray]) -> None:
        """What is due after a step, in the reference's order."""
        if step % self.save_freq == 0:
            self._save(self._label(step))
        if step % self.log_freq == 0:
            self._log(step, losses, infos)
        if self.renderer is not None and self.sample_freq:
            if step == 0:
                self._render_reference()
            if step % self.sample_freq == 0:
                self._render_samples(step)

    def _label(self, step: int) -> int:
        return step // self.label_freq * self.label_freq

    def _log(self, step: int, losses: np.ndarray, infos: dict[str, np.ndarray]) -> None:
        """Of the last step: the mean over its micro-batches (the reference prints half of the last one's)."""
        n = 1 if self.merge else self.accumulate
        row = {"loss": float(np.mean(losses[-n:]))} | {k: float(np.mean(v[-n:])) for k, v in infos.items()}
        now = time.monotonic()
        shown = " | ".join(f"{name}: {value:8.4f}" for name, value in row.items() if name != "loss")
        self.say(f"{step}: {row['loss']:8.4f} | {shown} | t: {now - self._began:8.4f}")
        self.record({"itr": step, "kind": "train", **row, "seconds": now - self._began})
        self._began = now

    # ---------- pictures ----------

    def _render_reference(self) -> None:
        items = self.noise.permutation(len(self.dataset))[: self.n_reference]
        self.renderer.composite("_sample-reference.png", self._observations(self.dataset.trajectories(items)))

    def _render_samples(self, step: int) -> None:
        model = self.trainer.ema_model
        shape = (model.n_timesteps + 1, SAMPLES_DRAWN, model.horizon, model.transition_dim)
        for i in range(PICTURES):
            window = self.dataset.trajectories(next(self.shown))
            known = {
                t: tf.constant(window[:, t, model.action_dim :], model.dtype) for t in self.dataset.condition_times
            }
            samples = self._sample(known, tf.constant(self.noise.normal(shape), model.dtype)).trajectories.numpy()
            first = np.repeat(window[:, :1], SAMPLES_DRAWN, axis=0).astype(samples.dtype)
            self.renderer.composite(
                f"sample-{step}-{i}.png", self._observations(np.concatenate([first, samples], axis=1))
            )

    def _observations(self, trajectories: np.ndarray) -> np.ndarray:
        normalizer = self.dataset.normalizers["observations"]
        return normalizer.unnormalize(trajectories[..., self.dataset.action_dim :])

    # ---------- state ----------

    def _save(self, label: int) -> None:
        tensors, metadata = self.state()
        if bad := not_finite(tensors):
            raise UserError(f"{bad} is no longer finite before step {self.step}: lower --learning_rate")
        self.save_to(label, tensors, metadata)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Weights, their average, the optimizer, and everything that decides on the next step."""
        trainer = self.trainer
        tensors = {f"model.{k}": v for k, v in state_dict(trainer.model).items()}
        tensors |= {f"ema.{k}": v for k, v in state_dict(trainer.ema_model).items()}
        tensors |= {f"optimizer.network.{k}": v for k, v in trainer.optimizer.state().items()}
        tensors |= {"train.order": self.windows.order, "train.shown": self.shown.order}
        state = {"position": self.windows.position, "shown": self.shown.position}
        noise = self.noise.state() if hasattr(self.noise, "state") else None
        return tensors, {"step": self.step, "train": {**state, "noise": noise}}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `state` was taken."""
        state = checkpoint.metadata["train"]
        load_state_dict(self.trainer.model, checkpoint.select("model."))
        load_state_dict(self.trainer.ema_model, checkpoint.select("ema."))
        self.trainer.optimizer.restore(checkpoint.select("optimizer.network."))  # but not its rate: `run` sets that
        self.windows.order, self.windows.position = checkpoint.tensors["train.order"], int(state["position"])
        self.shown.order, self.shown.position = checkpoint.tensors["train.shown"], int(state["shown"])
        self.noise.restore(state["noise"])
        self.step = int(checkpoint.metadata["step"])

    def report(self) -> Iterator[str]:
        """Lines on the size of the network: the whole and the ten largest parts."""
        sizes = {p.name: math.prod(p.variable.shape) for p in named_parameters(self.trainer.model)}
        yield f"parameters: {sum(sizes.values()):,}"
        largest = sorted(sizes.items(), key=lambda item: -item[1])
        for name, size in largest[:10]:
            yield f"    {name:<48} {size:>10,}"
        if len(largest) > 10:
            yield f"    and {len(largest) - 10} more with {sum(size for _, size in largest[10:]):,}"

    def check(self) -> None:
        """One loss and its gradients, before anything is written: what does not fit together fails here."""
        model, item = self.trainer.model, np.zeros(1, np.int64)
        shape = (1, model.horizon, model.transition_dim)
        with tf.GradientTape() as tape:
            loss, _ = self.trainer.loss(tf.constant(item, tf.int32), tf.constant(item), tf.zeros(shape, model.dtype))
        if any(grad is None for grad in tape.gradient(loss, self.trainer.variables)):
            raise UserError("part of the network is not trained by its loss: check model and diffusion")


def _joined(batches: list[MicroBatch]) -> MicroBatch:
    items, t, noise = (np.concatenate(column) for column in zip(*batches, strict=True))
    return items, t, noise
