"""The offline training loop: epochs over a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.cluster import replicas
from diffusion_rl.config.compose import Config, merged, plain_copy
from diffusion_rl.config.instantiate import instantiate
from diffusion_rl.core.ema import AVERAGE, COPY, KEEP
from diffusion_rl.core.keras import floatx
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.typing import Rng
from diffusion_rl.interop.torch_names import state_dict
from diffusion_rl.methods.pretraining.losses import BATCHES_PER_CALL, PreTrainable, PreTrainer
from diffusion_rl.networks.mlp import draw_masks
from diffusion_rl.networks.vision import check_images
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.continuation import PRE_TRAINING_MAY_CHANGE
from diffusion_rl.training.loop import Losses, TrainingLoop, part_tensors, restore_parts, restore_rng, rng_state
from diffusion_rl.training.policy_files import build_policy, evaluation_of, policy_facts
from diffusion_rl.training.run_dir import RunDir
from diffusion_rl.training.run_facts import normalization_facts
from diffusion_rl.training.state_files import StateFiles

Observer = Callable[[dict[str, Any]], None]


class PreTraining(TrainingLoop):
    """`pre_*` configurations: diffusion, flow, Gaussian and mixture policies.

    Args:
        cfg: the configuration (keys as in the reference).
        model, dataset, rng: given objects instead of those the configuration describes.
        observer: called at the end of every epoch with what was computed in it.
    """

    UNIT, LABEL, CURE = "epoch", "pre-training", "lower train.learning_rate"
    HELD_SECONDS = 0.0

    def __init__(
        self,
        cfg: Config,
        model: PreTrainable | None = None,
        dataset: Any = None,
        rng: Rng | None = None,
        observer: Observer | None = None,
    ):
        self.cfg, self.train, self.observer = cfg, cfg["train"], observer
        self.seed = int(cfg.get("seed", 42))
        self.rng = NoiseSource(self.seed) if rng is None else rng
        self.model = model if model is not None else build_policy(cfg, self.seed, "model.network_path")
        self.dataset = dataset if dataset is not None else instantiate(cfg["train_dataset"])
        self.bounds = normalization_facts(self._bounds_path())
        if "obs_dim" in cfg:
            self.dataset.require_dims(int(cfg["obs_dim"]), int(cfg["action_dim"]))
        images = self.dataset.images
        where = str(cfg.get("train_dataset_path", "the data set"))
        check_images(self.model.network, None if images is None else images.shape[1:], where)
        self.items, self.validation = np.arange(len(self.dataset)), np.empty(0, np.int64)
        if float(self.train.get("train_split", 1)) < 1:
            self.items, self.validation = self.dataset.split(float(self.train["train_split"]), NoiseSource(self.seed))
        self.trainer: Any = PreTrainer(self.model, self.dataset, self.train, cfg["ema"]["decay"])
        group = replicas.present()
        if group is not None:
            self.trainer = SharedSteps(self.trainer, group, lambda: state_dict(self.model))
        self.total, self.n_batches = int(self.train["n_epochs"]), 0
        self.units = math.ceil(len(self.items) / int(self.train["batch_size"]))
        self._losses, self._row = np.zeros(0), dict[str, Any]()

    @staticmethod
    def replica(settings: Mapping[str, Any]) -> TrainingReplica:
        """Builds what another process holds that trains with this one; settings: the whole configuration."""
        return TrainingReplica(settings)

    @property
    def ema_model(self) -> PreTrainable:
        """Returns the policy with averaged weights."""
        return _Averaged(self.trainer.ema_network)  # type: ignore[return-value]

    @property
    def epoch(self) -> int:
        """Returns the epoch that comes next, or runs; the first one is 1."""
        return self.step + 1

    def run(self, until: int | None = None) -> list[dict[str, Any]]:
        """Trains as `TrainingLoop.run` does."""
        settings = plain_copy(self.cfg)
        files = StateFiles(self.model.KIND, settings, "epoch", PRE_TRAINING_MAY_CHANGE)
        self.run_dir = RunDir(self.cfg["logdir"], settings, files)
        return super().run(until)

    def advance(self, end: int) -> tuple[int, Losses]:
        """Trains for one epoch."""
        self._losses = self._epoch()
        loss = float(np.mean(self._losses))
        self.check_finite({"the loss": loss}, self.epoch)
        self._row = {"epoch": self.epoch, "kind": "train", "loss": loss}
        self._row |= {"validation_loss": self._validate(), "learning_rate": self._learning_rate()}
        self.trainer.end_epoch()
        return 1, {}

    def due(self, what: str) -> bool:
        return what == "log" or self.number % int(self.train["save_model_freq"]) == 0

    def row(self) -> dict[str, Any]:
        return self._row

    def evaluation(self) -> str:
        return evaluation_of(plain_copy(self.cfg), self.run_dir.path)

    def saved(self, keep: bool) -> None:
        if self.observer is not None:
            self.observer(self._observed(self._losses))

    # ---------- one epoch ----------

    def _epoch(self) -> np.ndarray:
        size = int(self.train["batch_size"])
        order = self.items[self.rng.permutation(len(self.items))]
        n_full = len(order) // size
        full = order[: n_full * size].reshape(n_full, size)
        batches = [full[i : i + BATCHES_PER_CALL] for i in range(0, n_full, BATCHES_PER_CALL)]
        if len(order) % size:
            batches.append(order[n_full * size :][None])
        losses = []
        for items in batches:
            t, noise = self._draw(items.shape, self.rng)
            shifts = self._draw_shifts(items.shape)
            losses.append(self.trainer.steps(items, t, noise, self._averaging(len(items)), shifts))
            self.progress.doing()
            self.progress.update(len(items), turn=False)
            self.run_dir.stop_if_requested()
        return np.concatenate(losses)

    def _draw(self, shape: tuple[int, ...], rng: Rng, training: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Draws times and noise for windows of that shape; of likelihoods zeros, and dropout's masks."""
        if hasattr(self.model, "draw_training"):
            return self.model.draw_training(rng, shape)
        masks = draw_masks(self.model.network, rng, shape) if training else np.zeros((*shape, 0), floatx())
        return np.zeros(shape, np.int64), masks

    def _draw_shifts(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """Draws shifts of the images of windows of that shape, for networks that augment them."""
        network = self.model.network
        size = network.shifts_shape(1) if hasattr(network, "shifts_shape") else None
        return None if size is None else self.rng.integers(0, 2 * network.vision.aug.pad + 1, (*shape, *size[1:]))

    def _averaging(self, n: int) -> np.ndarray:
        """Decides how the average follows each of n batches; in the first epochs it is a plain copy."""
        every = int(self.train.get("update_ema_freq", 10))
        kind = COPY if self.epoch < int(self.train.get("epoch_start_ema", 20)) else AVERAGE
        numbers = self.n_batches + np.arange(n)
        self.n_batches += n
        return np.where(numbers % every == 0, kind, KEEP)

    def _validate(self) -> float | None:
        """Returns the mean loss over the held-out windows, always with the same noise; None when it is not due."""
        if not len(self.validation) or self.epoch % int(self.train.get("val_freq", 100)):
            return None
        size, rng = int(self.train["batch_size"]), NoiseSource(self.seed)
        total = 0.0
        for i in range(0, len(self.validation), size):
            items = self.validation[i : i + size]
            total += self.trainer.evaluate(items, *self._draw(items.shape, rng, training=False)) * len(items)
        return total / len(self.validation)

    def _learning_rate(self) -> float:
        return float(self.trainer.optimizer.learning_rate.numpy())

    # ---------- state ----------

    def parts(self) -> dict[str, Any]:
        """Returns networks and optimizer under their names in checkpoints."""
        return {"model": self.model, "ema": self.ema_model, "optimizer.network": self.trainer.optimizer}

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        metadata = {
            "kind": self.model.KIND,
            **policy_facts(self.model),
            "normalization": self.bounds,
            "train": {
                "schedule": self.trainer.schedule.state(),
                "noise": rng_state(self.rng),
                "n_batches": self.n_batches,
            },
        }
        return part_tensors(self.parts()), metadata

    def _bounds_path(self) -> Path | None:
        """Returns where the bounds of the training data stand: beside them."""
        data = self.cfg.get("train_dataset_path")
        return Path(data).with_name("normalization.npz") if data else None

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.metadata["train"]
        restore_parts(self.parts(), checkpoint)
        self.trainer.schedule.restore(state["schedule"])
        self.trainer.optimizer.learning_rate.assign(self.trainer.schedule.lr)
        restore_rng(self.rng, state["noise"])
        self.n_batches, self.step = int(state["n_batches"]), int(checkpoint.metadata["epoch"])
        if isinstance(self.trainer, SharedSteps):
            self.trainer.load(checkpoint)

    def _observed(self, losses: np.ndarray) -> dict[str, Any]:
        return {
            "epoch": self.number,
            "loss_train": float(np.mean(losses)),
            "losses": {"loss": losses},
            "lr": {"optimizer": self._learning_rate()},
        }


class _Averaged:
    """The averaged network under the name it has in a policy."""

    def __init__(self, network: Any):
        self.network = network


class TrainingReplica:
    """The training of a process that trains with the driver: the same data, and steps when the driver makes them."""

    def __init__(self, settings: Mapping[str, Any]):
        self.training = PreTraining(merged(settings, {}))

    def steps(self, *batches: Any) -> None:
        """Trains on batches as `PreTrainer.steps` does."""
        self.training.trainer.steps(*batches)

    def end_epoch(self) -> None:
        """Advances the learning rate."""
        self.training.trainer.end_epoch()

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the policy's weights by name."""
        return state_dict(self.training.model)

    def load(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint."""
        self.training.restore(checkpoint)


class SharedSteps(replicas.InStep):
    """The trainer of a policy, whose batches are shared with other processes."""

    def steps(self, *batches: Any) -> np.ndarray:
        """Trains on batches as `PreTrainer.steps` does; returns their losses [n]."""
        return self.together("steps", *batches, ours=lambda: self._trainer.steps(*batches))

    def end_epoch(self) -> None:
        """Advances the learning rate everywhere, and looks whether the weights are still the same."""
        self.together("end_epoch", ours=self._trainer.end_epoch)
        self.require_equal()

    def load(self, checkpoint: Checkpoint) -> None:
        """Lets the others go on from a checkpoint, too."""
        self.together("load", checkpoint, ours=lambda: None)
