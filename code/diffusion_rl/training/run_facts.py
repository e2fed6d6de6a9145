"""What a checkpoint records of the run that wrote it, compared with the run that takes it.

A policy's weights mean something only with the bounds, the network and the task they were trained with. Whatever is
recorded and differs is said: as an error where the result would be meaningless, as a warning where it may be meant.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.config.compose import Config
from diffusion_rl.config.instantiate import default_arguments, flatten, plain
from diffusion_rl.core.errors import UserError
from diffusion_rl.data.normalizers import read_bounds
from diffusion_rl.tasks.registry import same_task
from diffusion_rl.training.checkpoint import Checkpoint

log = logging.getLogger(__name__)

#: Arguments of networks that may change between pre-training and what follows: the weights act without them.
FREE_ARGUMENTS = ("fixed_std", "learn_fixed_std", "std_min", "std_max", "dropout", "p_drop_*", "augment", "device")
BOUNDS_TOLERANCE = 1e-4  # of a range: files hold float32 or float64


# ---------- a policy's checkpoint ----------


def compare_policy(checkpoint: Checkpoint, cfg: Mapping[str, Any], path: Any, evaluating: bool) -> None:
    """Compares a policy's checkpoint with a run that evaluates it, or trains it further.

    Raises:
        UserError: the network or what it predicts differ; in an evaluation also the bounds or the task.
    """
    for difference in (*_network_differences(checkpoint, cfg), *_prediction_differences(checkpoint, cfg)):
        raise UserError(f"{path} was trained with {difference}")
    softer = [*_task_difference(checkpoint, cfg), *bounds_difference(checkpoint, bounds_path(cfg))]
    for meant, difference in softer:
        if evaluating and not meant:
            raise UserError(f"{path} was trained with {difference}")
        log.warning("%s was trained with %s", path, difference)


def bounds_path(cfg: Mapping[str, Any]) -> str | None:
    """Returns the normalization file that the environments of a run use."""
    env = cfg.get("env")
    wrappers = (env.get("wrappers") or {}) if isinstance(env, Mapping | Config) else {}
    paths = (w.get("normalization_path") for w in wrappers.values() if w)
    return next((path for path in paths if path), None)


def task_name(config: Mapping[str, Any]) -> str:
    """Returns the environment's name, or in pre-training the data set's."""
    env = config.get("env")
    name = env.get("name") if isinstance(env, Mapping | Config) else env
    return str(name or config.get("env_name") or "")


def _task_difference(checkpoint: Checkpoint, cfg: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    theirs, ours = task_name(recorded_config(checkpoint)), task_name(cfg)
    if theirs and not (same := same_task(theirs, ours)):
        yield same is None, f"the task {theirs}, this run's is {ours}"


def bounds_difference(checkpoint: Checkpoint, path: str | None) -> Iterator[tuple[bool, str]]:
    """Yields (False, how they differ) where a checkpoint's normalization is not that of the file."""
    theirs, ours = checkpoint.metadata.get("normalization"), normalization_facts(path)
    if not isinstance(theirs, Mapping) or not ours:
        return
    for part in ("obs", "action"):
        low, high = (np.asarray(theirs.get(f"{part}_{end}", []), np.float64) for end in ("min", "max"))
        other = [np.asarray(ours[f"{part}_{end}"], np.float64) for end in ("min", "max")]
        if low.shape != other[0].shape or high.shape != other[1].shape:
            continue  # dimensions are compared elsewhere
        apart = np.maximum(abs(low - other[0]), abs(high - other[1])) > BOUNDS_TOLERANCE * np.maximum(high - low, 1e-3)
        if apart.any():
            i = int(np.argmax(apart))
            yield (
                False,
                f"another normalization than {path}: {part} {i} from {low[i]:.4g} to {high[i]:.4g} there, "
                f"from {other[0][i]:.4g} to {other[1][i]:.4g} here; give normalization_path=<the file of its training>",
            )
            return


def _network_differences(checkpoint: Checkpoint, cfg: Mapping[str, Any]) -> Iterator[str]:
    theirs, ours = (_network(config) for config in (recorded_config(checkpoint), cfg))
    if not theirs or not ours:
        return
    if theirs["_target_"] != ours["_target_"]:
        yield f"the network {theirs['_target_']}, this run's is {ours['_target_']}"
        return
    full = [default_arguments(node["_target_"]) | flatten(node) for node in (theirs, ours)]
    for key in sorted(full[0].keys() & full[1].keys()):
        free = any(fnmatch.fnmatchcase(key.rpartition(".")[2], pattern) for pattern in FREE_ARGUMENTS)
        if full[0][key] != full[1][key] and not free:
            yield f"{key}={full[0][key]} of its network, this run has {full[1][key]}"


def _network(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the node of the network that acts."""
    model = config.get("model")
    model = plain(model)
    node = (model.get("network") or model.get("actor")) if isinstance(model, Mapping) else None
    return dict(node) if isinstance(node, Mapping) and isinstance(node.get("_target_"), str) else None


def _prediction_differences(checkpoint: Checkpoint, cfg: Mapping[str, Any]) -> Iterator[str]:
    theirs = (checkpoint.metadata.get("sampling") or {}).get("predict_epsilon")
    ours = (cfg.get("model") or {}).get("predict_epsilon", True)
    if theirs is not None and bool(theirs) != bool(ours):
        yield f"model.predict_epsilon={theirs}, this run has {ours}"


def recorded_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Returns the configuration that a checkpoint records; {} where it has none."""
    config = checkpoint.metadata.get("config")
    return config if isinstance(config, Mapping) else {}


def normalization_facts(path: str | Path | None) -> dict[str, list[float]] | None:
    """Reads the bounds of a normalization file as lists; None where there is no such file.

    Raises UserError for a file without proper bounds.
    """
    if not path or not Path(path).is_file():
        return None
    return {key: np.asarray(value, np.float64).tolist() for key, value in read_bounds(path).items()}
