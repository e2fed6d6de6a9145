"""What DiffuserLite leaves on disk: weights in PyTorch's format, states of training, logs, pairs of the reflow, copies.

results/<pipeline>/<task>/ holds `diffusion<l>_ckpt_<step>.pt`, `reflow<l>_ckpt_<step>.pt`, `invdyn_ckpt_<step>.pt` and
`iql_ckpt_<step>.pt`, each also as `_latest`, under the names and in the layout of the authors' code, whose files can be
read in their place; `train_state_<mode>.safetensors` to go on from; `normalizer.npz`; `loss_log.json`; and
`traj_cond_dataset.h5`, `traj_uncond_dataset.h5`. results/loss_log.json is that of the last run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from diffusion_rl.config.instantiate import flatten
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file, read_json
from diffusion_rl.data.episodes import read_npz
from diffusion_rl.data.hdf5 import open_hdf5
from diffusion_rl.interop.torch_checkpoint import read_pt, write_pt
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.methods.diffuser_lite.levels import PlanLevel
from diffusion_rl.methods.diffuser_lite.training import Pairs
from diffusion_rl.training.checkpoint import Checkpoint, checkpoint_metadata, require_finite, require_kind
from diffusion_rl.training.continuation import refuse_changes
from diffusion_rl.training.state_files import StateFiles

KIND = "diffuser_lite"  # of states of training
LATEST = "latest"
PREFIXES = {"invdyn": "model.", "iql": ""}  # of our names for weights, which the authors' files do without


# ---------- weights ----------


def save_levels(folder: Path, name: str, levels: Sequence[PlanLevel], labels: Sequence[int | str]) -> None:
    """Writes `<name><l>_ckpt_<label>.pt` of each level."""
    for i, level in enumerate(levels):
        data = {"model": state_dict(level.network), "model_ema": state_dict(level.ema)}
        _write_all(folder, f"{name}{i}", data, labels)


def load_levels(folder: Path, name: str, levels: Sequence[PlanLevel], label: int | str) -> None:
    """Raises UserError for a missing file, or one of other networks."""
    for i, level in enumerate(levels):
        path = checkpoint_path(folder, f"{name}{i}", label)
        data = _weights(path)
        if not {"model", "model_ema"} <= set(data) or not all(isinstance(data[key], dict) for key in data):
            raise UserError(f"{path} is no checkpoint of a level: it needs model and model_ema")
        for part, network in (("model", level.network), ("model_ema", level.ema)):
            require_finite(data[part], path)
            load_state_dict(network, data[part])


def save_network(folder: Path, name: str, network: Any, labels: Sequence[int | str]) -> None:
    """Writes `<name>_ckpt_<label>.pt` of "invdyn", the inverse dynamics, or "iql"."""
    data = {key.removeprefix(PREFIXES[name]): value for key, value in state_dict(network).items()}
    _write_all(folder, name, data, labels)


def load_network(folder: Path, name: str, network: Any, label: int | str = LATEST) -> None:
    """Fills "invdyn" or "iql". Raises UserError for a missing file, or one of another network."""
    path = checkpoint_path(folder, name, label)
    data = _weights(path)
    require_finite(data, path)
    load_state_dict(network, {PREFIXES[name] + key: value for key, value in data.items()})


def _weights(path: Path) -> dict[str, Any]:
    data = read_pt(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no weights by name")
    return data


def _write_all(folder: Path, name: str, data: Any, labels: Sequence[int | str]) -> None:
    for label in labels:
        write_pt(folder / f"{name}_ckpt_{label}.pt", data)


def checkpoint_path(folder: Path, name: str, label: int | str) -> Path:
    """Raises UserError where there is none, naming what there is and the mode that makes one."""
    path = folder / f"{name}_ckpt_{label}.pt"
    if not path.is_file():
        there = ", ".join(map(str, saved_steps(folder, name))) or "none"
        mode = {"reflow": "reflow", "iql": "iql_training"}.get(name.rstrip("0123456789"), "training")
        raise UserError(f"no {path}: run mode={mode} first, or choose another step (there are: {there})")
    return path


def saved_steps(folder: Path, name: str) -> list[int]:
    """Steps of the numbered checkpoints of a name ("diffusion0"), ascending."""
    labels = (path.stem.removeprefix(f"{name}_ckpt_") for path in folder.glob(f"{name}_ckpt_*.pt"))
    return sorted(int(label) for label in labels if label.isdigit())


def labels_of(step: int, save_interval: int, keep_every: int | None) -> list[int | str]:
    """Names a checkpoint: "latest", and its step where that stays (the first of every `keep_every`)."""
    stays = keep_every is None or (step - save_interval) % keep_every == 0
    return [step, LATEST] if stays else [LATEST]


# ---------- states of training ----------


def state_path(folder: Path, mode: str, step: int | None = None) -> Path:
    """Returns `train_state_<mode>.safetensors`, the latest, or the same with `_<step>`, where states are kept."""
    return folder / f"train_state_{mode}{'' if step is None else f'_{step}'}.safetensors"


#: Options of a training that it goes on with as they were.
SETTLED = (
    *("task", "seed", "noreaching_penalty", "terminal_penalty", "discount", "emb_dim", "d_model", "n_heads", "depth"),
    *("standard_residual", "backbone", "next_obs_loss_weight", "ema_rate", "learning_rate", "invdyn_learning_rate"),
    *("invdyn_gradient_steps", "iql_hidden_dim", "iql_batch_size", "iql_target_updates", "mask_padding", "batch_size"),
    *("reflow_backbone_ckpt", "reflow_lr"),
)


def settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a training's options that it goes on with unchanged, flat."""
    return flatten({key: options[key] for key in SETTLED if key in options})


class PipelineFiles(StateFiles):
    """States as `train_state_<mode>.safetensors` in the task's folder, beside weights in PyTorch's format.

    Args:
        folder: of the task.
        options: of the training, `mode` among them.
        steps: of the whole training.
        write_weights: writes the weights of a step under labels.
        log: of the losses.
        backup: copies the results elsewhere.
    """

    starts_over, FOLDERS = True, False
    HINT = "; states of single steps are kept with keep_states=true"

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, Any],
        steps: int,
        write_weights: Callable[[int, Sequence[int | str]], None],
        log: LossLog,
        backup: Callable[[], None],
    ):
        super().__init__(KIND, options, "step")
        self.task_folder, self.mode, self.steps, self.write_weights = folder, options["mode"], steps, write_weights
        self.log, self.backup = log, backup

    def folder(self, run: Path) -> Path:
        return self.task_folder

    def path(self, run: Path, number: int, keep: bool) -> Path:
        return state_path(self.task_folder, self.mode, number if keep and self.settings["keep_states"] else None)

    def existing(self, run: Path) -> list[tuple[int, Path]]:
        latest, kept = state_path(self.task_folder, self.mode), f"train_state_{self.mode}_"
        states = [(int(p.stem.removeprefix(kept)), p) for p in self.task_folder.glob(f"{kept}[0-9]*.safetensors")]
        if latest.is_file():
            states.append((checkpoint_metadata(latest).get("step", sys.maxsize), latest))
        return sorted(states, key=lambda state: state[0])

    def facts(self, number: int) -> dict[str, Any]:
        return {"kind": KIND, "mode": self.mode, "options": settled(self.settings)}

    def check(self, checkpoint: Checkpoint, path: Path) -> None:
        """Raises UserError for a state of another mode, length (the schedule would be another) or other options."""
        require_kind(checkpoint, KIND, path)
        require_finite(checkpoint.tensors, path)
        facts = checkpoint.metadata
        if facts.get("mode") != self.mode:
            raise UserError(f"{path} is of mode={facts.get('mode')}: give a state of mode={self.mode}")
        if (steps := facts.get("steps")) != self.steps:
            raise UserError(
                f"{path} is of a run of {steps} steps, this one has {self.steps}: give the same number, which the "
                "learning rate depends on (stop_at ends earlier), or start anew in another results_dir"
            )
        refuse_changes(facts.get("options") or {}, settled(self.settings), path)

    def begin(self, run: Path, last: int) -> None:
        self.log.truncate(last)

    def write_beside(self, run: Path, number: int) -> None:
        """Writes the weights, called after their step where that stays."""
        self.write_weights(number, labels_of(number, self.settings["save_interval"], self.settings["keep_every"]))

    def copy(self, run: Path) -> None:
        self.backup()


# ---------- logs and copies ----------


class LossLog:
    """`loss_log.json`: rows by gradient step; a row that comes again replaces the earlier one."""

    def __init__(self, folder: Path, results: Path, name: str = "loss_log.json"):
        self.path, self.shown = folder / name, results / name
        self.rows: dict[int, dict[str, Any]] = {}
        if self.path.is_file():
            rows = read_json(self.path)
            try:
                self.rows = {int(row["gradient_steps"]): dict(row) for row in rows}
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{self.path} is damaged ({error}): delete it, or start anew elsewhere") from error

    def truncate(self, step: int) -> None:
        """Drops rows after a step."""
        self.rows = {k: v for k, v in self.rows.items() if k <= step}

    def add(self, row: Mapping[str, Any]) -> None:
        """Keeps a row."""
        self.rows[row["gradient_steps"]] = dict(row)
        self.write()

    def write(self) -> None:
        text = json.dumps([self.rows[k] for k in sorted(self.rows)], indent=1) + "\n"
        for path in (self.path, self.shown):
            with atomic_file(path) as file:
                file.write(text.encode())


def mirror(source: Path, target: Path) -> int:
    """Copies files that are new or have changed, each under its final name only when it is whole. Returns how many."""
    copied = 0
    for path in sorted(source.rglob("*")):
        there = target / path.relative_to(source)
        if not path.is_file() or path.name.startswith("."):
            continue
        facts = path.stat()
        if there.is_file() and (there.stat().st_size, there.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns):
            continue
        with open(path, "rb") as original, atomic_file(there) as copy:
            shutil.copyfileobj(original, copy)
        os.utime(there, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        copied += 1
    return copied


# ---------- normalizer ----------


def save_normalizer(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with atomic_file(folder / "normalizer.npz") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_normalizer(folder: Path, otherwise: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Loads means and deviations of observations; the authors' checkpoints have none, so `otherwise` fits them."""
    path = folder / "normalizer.npz"
    return read_npz(path) if path.is_file() else otherwise()


# ---------- pairs for the reflow ----------


@contextmanager
def pairs_to_write(
    folder: Path, levels: Sequence[PlanLevel], conditional: int, unconditional: int, dtype: str
) -> Iterator[Callable[[int, int, np.ndarray, np.ndarray | None], None]]:
    """Opens files that take their names when the block ends well; gives the function that `Generation.run` calls."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {True: folder / "traj_cond_dataset.h5", False: folder / "traj_uncond_dataset.h5"}
    temporary = {kind: path.with_name(f".{path.name}.writing") for kind, path in names.items()}
    try:
        with h5py.File(temporary[True], "w") as with_returns, h5py.File(temporary[False], "w") as without:
            for i, level in enumerate(levels):
                with_returns.create_dataset(f"traj_cond_dataset_{i}", (conditional, 2, *level.shape), dtype)
                with_returns.create_dataset(f"condition_dataset_{i}", (conditional, 1), "float32")
                without.create_dataset(f"traj_uncond_dataset_{i}", (unconditional, 2, *level.shape), dtype)

            def write(level: int, first: int, pairs: np.ndarray, returns: np.ndarray | None) -> None:
                rows = slice(first, first + len(pairs))
                if returns is None:
                    without[f"traj_uncond_dataset_{level}"][rows] = pairs
                else:
                    with_returns[f"traj_cond_dataset_{level}"][rows] = pairs
                    with_returns[f"condition_dataset_{level}"][rows] = returns

            yield write
        for kind, path in names.items():
            os.replace(temporary[kind], path)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; choose smaller data sets or pairs_dtype=float16") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


@contextmanager
def pairs_to_read(folder: Path, levels: Sequence[PlanLevel]) -> Iterator[Pairs]:
    """Opens the pairs, on disk."""
    paths = [folder / name for name in ("traj_cond_dataset.h5", "traj_uncond_dataset.h5")]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"no {missing[0]}: run mode=prepare_dataset first")
    with open_hdf5(paths[0]) as with_returns, open_hdf5(paths[1]) as without:
        counted = range(len(levels))
        conditional = [with_returns.array(f"traj_cond_dataset_{i}") for i in counted]
        returns = [with_returns.array(f"condition_dataset_{i}") for i in counted]
        unconditional = [without.array(f"traj_uncond_dataset_{i}") for i in counted]
        for i, level in enumerate(levels):
            if any(pairs[i].shape[1:] != (2, *level.shape) for pairs in (conditional, unconditional)):
                raise UserError(f"{folder}: the pairs are of other levels: run mode=prepare_dataset")
        yield Pairs(*([array.stored for array in arrays] for arrays in (conditional, returns, unconditional)))
