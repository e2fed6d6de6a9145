"""What a checkpoint records of the run that wrote it, compared with the run that takes it.

A policy's weights mean something only with the bounds, the network and the task they were trained with. Whatever is
recorded and differs is said: as an error where the result would be meaningless, as a warning where it may be meant.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.config.compose import Config
from diffusion_rl.config.instantiate import PACKAGE, default_arguments, flatten, plain, targets
from diffusion_rl.core.errors import UserError
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.policy_files import normalization_facts

log = logging.getLogger(__name__)

#: Names of tasks begin with these; what follows tells data sets of one task apart.
FAMILIES = (
    *("hopper", "walker2d", "halfcheetah", "ant", "kitchen", "lift", "can", "square", "transport", "avoiding"),
    *("one_leg", "lamp", "round_table", "maze2d-umaze", "maze2d-medium", "maze2d-large"),
)
#: Arguments of networks that may change between pre-training and what follows: the weights act without them.
FREE_ARGUMENTS = ("fixed_std", "learn_fixed_std", "std_min", "std_max", "dropout", "p_drop_*", "augment", "device")
BOUNDS_TOLERANCE = 1e-4  # of a range: files hold float32 or float64

#: Settings with which a run may be resumed: they are read anew, or change no number.
NEUTRAL = (
    "logdir",
    "log_dir",
    "data_dir",
    "name",
    "resume",
    "device",
    "tensorboard",
    "wandb*",
    "project",
    "suite",
    "stage",
)
FINE_TUNING_MAY_CHANGE = (
    *NEUTRAL,
    *(
        "train.*lr",
        "train.*lr_scheduler.*",
        "train.*weight_decay",
        "train.*_freq",
        "train.render.*",
        "train.n_train_itr",
    ),
    *("train.gamma", "train.gae_lambda", "train.target_kl", "train.*_coef", "train.bc_loss_coeff", "train.batch_size"),
    *("train.update_epochs", "train.max_grad_norm", "train.fast", "train.force_train", "train.replay_ratio"),
    *(
        "train.n_eval_episode",
        "train.eval_*",
        "train.logprob_batch_size",
        "train.n_critic_warmup_itr",
    ),
    *("env.threads", "env.save_video", "env.render", "env.worker_timeout", "env.best_reward_threshold_for_success"),
    *("model.clip_*", "model.gamma_denoising", "model.randn_clip_value", "*.device"),
)
PRE_TRAINING_MAY_CHANGE = (
    *NEUTRAL,
    *(
        "train.n_epochs",
        "train.learning_rate",
        "train.lr_scheduler.*",
        "train.weight_decay",
        "train.*_freq",
        "train.fast",
    ),
    *("train.epoch_start_ema", "train.batch_size", "ema.decay", "*.device"),
)
LATENT_MAY_CHANGE = (
    *NEUTRAL,
    *("continue_training", "logbase", "exp_name", "exp_id", "job_name", "script_path", "num_workers", "arguments"),
    *("n_train_steps", "n_steps_per_epoch", "log_freq", "save_freq", "eval_freq", "num_eval", "num_envs", "fast"),
    *("evaluator", "test_ret", "condition_guidance_w", "use_ddim_sample", "n_ddim_steps", "sample_noise_scale"),
    *("*_weight", "clip_*", "ema_decay", "update_ema_every", "gae_lambda", "target_kl", "data_dir", "rl_*_freq"),
)


# ---------- a policy's checkpoint ----------


def compare_policy(checkpoint: Checkpoint, cfg: Mapping[str, Any], path: Any, evaluating: bool) -> None:
    """Compare a policy's checkpoint with a run that evaluates it, or trains it further.

    Raises:
        UserError: the network or what it predicts differ; in an evaluation also the bounds or the task.
    """
    for difference in (*_network_differences(checkpoint, cfg), *_prediction_differences(checkpoint, cfg)):
        raise UserError(f"{path} was trained with {difference}")
    softer = [*_task_difference(checkpoint, cfg), *_bounds_difference(checkpoint, bounds_path(cfg))]
    for meant, difference in softer:
        if evaluating and not meant:
            raise UserError(f"{path} was trained with {difference}")
        log.warning("%s was trained with %s", path, difference)


def bounds_path(cfg: Mapping[str, Any]) -> str | None:
    """The normalization file that the environments of a run use."""
    env = cfg.get("env")
    wrappers = (env.get("wrappers") or {}) if isinstance(env, Mapping | Config) else {}
    paths = (w.get("normalization_path") for w in wrappers.values() if w)
    return next((path for path in paths if path), None)


def task_name(config: Mapping[str, Any]) -> str:
    """The environment's name, or in pre-training the data set's."""
    env = config.get("env")
    name = env.get("name") if isinstance(env, Mapping | Config) else env
    return str(name or config.get("env_name") or "")


def same_task(one: str, other: str) -> bool | None:
    """Whether two names of environments or data sets are of one task; None where that cannot be known."""
    if one == other:
        return True
    families = [next((family for family in FAMILIES if name.startswith(family)), None) for name in (one, other)]
    return None if None in families else families[0] == families[1]


def _task_difference(checkpoint: Checkpoint, cfg: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    theirs, ours = task_name(_config(checkpoint)), task_name(cfg)
    if theirs and not (same := same_task(theirs, ours)):
        yield same is None, f"the task {theirs}, this run's is {ours}"


def _bounds_difference(checkpoint: Checkpoint, path: str | None) -> Iterator[tuple[bool, str]]:
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
    theirs, ours = (_network(config) for config in (_config(checkpoint), cfg))
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
    """The node of the network that acts."""
    model = config.get("model")
    model = plain(model)
    node = (model.get("network") or model.get("actor")) if isinstance(model, Mapping) else None
    return dict(node) if isinstance(node, Mapping) and isinstance(node.get("_target_"), str) else None


def _prediction_differences(checkpoint: Checkpoint, cfg: Mapping[str, Any]) -> Iterator[str]:
    theirs = (checkpoint.metadata.get("sampling") or {}).get("predict_epsilon")
    ours = (cfg.get("model") or {}).get("predict_epsilon", True)
    if theirs is not None and bool(theirs) != bool(ours):
        yield f"model.predict_epsilon={theirs}, this run has {ours}"


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    config = checkpoint.metadata.get("config")
    return config if isinstance(config, Mapping) else {}


# ---------- resuming ----------


def compare_settings(checkpoint: Checkpoint, now: Mapping[str, Any], path: Path, may_change: Sequence[str]) -> None:
    """Compare the settings of the run that a checkpoint is of with those of the run that goes on with it.

    may_change: patterns of keys whose new values take effect; what changed of them is said.

    Raises:
        UserError: another setting differs, so that the run would go on otherwise than it says.
    """
    if not _config(checkpoint):
        return
    refuse_changes(_filled(_config(checkpoint)), _filled(now), path, may_change)
    for _, difference in _bounds_difference(checkpoint, bounds_path(now)):
        raise UserError(f"resume={path}: that run was trained with {difference}")


def refuse_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], path: Path, may_change: Sequence[str] = ()
) -> None:
    """Compare flat settings of a run with those it is resumed with. Raises UserError, or says what changed."""
    changed = [key for key in before if key not in after or not _same(key, before[key], after[key])]
    refused = [key for key in changed if not any(fnmatch.fnmatchcase(key, pattern) for pattern in may_change)]
    if refused:
        shown = ", ".join(f"{key}={before[key]} (now {after.get(key, 'left out')})" for key in refused[:4])
        raise UserError(
            f"resume={path}: that run has {shown}, which resuming cannot change: leave it, or start another run"
        )
    changed += [key for key in after if key not in before]
    told = [key for key in changed if not any(fnmatch.fnmatchcase(key, pattern) for pattern in NEUTRAL)]
    if told:
        facts = (f"{key}={after.get(key, 'its default')} (was {before.get(key, 'not set')})" for key in told)
        log.warning("resumed with %s", ", ".join(facts))


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat configuration, with the defaults of its objects' arguments."""
    flat = flatten(config)
    for where, mapping in targets(config):
        if where and str(mapping["_target_"]).startswith(PACKAGE):
            defaults = {f"{where}.{key}": value for key, value in default_arguments(mapping["_target_"]).items()}
            flat = {key: value for key, value in defaults.items() if key not in flat} | flat
    return {key: value for key, value in flat.items() if not isinstance(value, Mapping)}


def _same(key: str, one: Any, other: Any) -> bool:
    """Whether two values are equal; a file that lies elsewhere today is the same file by its name."""
    if one == other:
        return True
    if isinstance(one, str) and isinstance(other, str) and key.rpartition(".")[2].endswith("_path"):
        return Path(one).name == Path(other).name and Path(one).parent.name == Path(other).parent.name
    return False
