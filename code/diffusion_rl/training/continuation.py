"""How a run goes on: which state `resume` means, whether it fits, and what may have changed. Everything that decides
on resuming stands here; loops only give and take states.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.config.instantiate import PACKAGE, default_arguments, flatten, targets
from diffusion_rl.config.keys import complete
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.programs import GO_ON, as_here
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.run_facts import bounds_difference, bounds_path, recorded_config

if TYPE_CHECKING:
    from diffusion_rl.training.state_files import StateFiles

log = logging.getLogger(__name__)

AUTO = "auto"  # the newest state if there is one
NEVER = ("never", "False", "None", "")
NEWEST = ("True", "latest")  # the newest state, which must be there
#: Column of the metrics for a row whose environments began anew.
BEGAN_ANEW = "resumed_without_simulator_state"

#: Settings with which a run may be resumed: they are read anew, or change no number.
NEUTRAL = (
    *("logdir", "log_dir", "data_dir", "name", "resume", "device", "tensorboard", "wandb*", "project", "suite"),
    *("stage", "stop_at", "train.stop_at"),
)
FINE_TUNING_MAY_CHANGE = (
    *NEUTRAL,
    *("train.*lr", "train.*lr_scheduler.*", "train.*weight_decay", "train.*_freq", "train.render.*"),
    *("train.n_train_itr", "train.gamma", "train.gae_lambda", "train.target_kl", "train.*_coef"),
    *("train.bc_loss_coeff", "train.batch_size", "train.update_epochs", "train.max_grad_norm", "train.fast"),
    "train.precision",
    *("train.force_train", "train.replay_ratio", "train.n_eval_episode", "train.eval_*"),
    *("train.logprob_batch_size", "train.n_critic_warmup_itr", "train.n_steps", "env.n_envs"),
    *("env.threads", "env.save_video", "env.render", "env.worker_timeout", "env.best_reward_threshold_for_success"),
    *("model.clip_*", "model.gamma_denoising", "model.randn_clip_value", "*.device"),
)
PRE_TRAINING_MAY_CHANGE = (
    *NEUTRAL,
    *("train.n_epochs", "train.learning_rate", "train.lr_scheduler.*", "train.weight_decay", "train.*_freq"),
    *("train.fast", "train.precision", "train.epoch_start_ema", "train.batch_size", "ema.decay", "*.device"),
)
LATENT_MAY_CHANGE = (
    *NEUTRAL,
    *("continue_training", "logbase", "exp_name", "exp_id", "job_name", "script_path", "num_workers", "arguments"),
    *("n_train_steps", "n_steps_per_epoch", "log_freq", "save_freq", "eval_freq", "num_eval", "num_envs", "fast"),
    *("evaluator", "test_ret", "condition_guidance_w", "use_ddim_sample", "n_ddim_steps", "sample_noise_scale"),
    *("*_weight", "clip_*", "ema_decay", "update_ema_every", "gae_lambda", "target_kl", "data_dir", "rl_*_freq"),
)


@dataclass(frozen=True)
class Spelling:
    """How a program writes what its user can do about a run folder."""

    again: str = GO_ON  # go on with what is in the folder
    anew: str = "name another logdir"
    last: str = "resume={path}"  # the last line of an interrupted run
    evaluate: str = ""  # the command that evaluates what was trained

    def go_on(self, run: Path) -> str:
        """Returns how to go on with a run folder."""
        return self.last.format(path=run)


def program(script: str, *words: str) -> str:
    """Returns a command line that runs a program of the repository from the working directory."""
    written = shlex.join(["python", script, *words])
    if (command := as_here(written)) != written or Path(script).exists():
        return command
    return shlex.join(["python", str(REPOSITORY / script), *words])


def asked_state(settings: Mapping[str, Any]) -> str:
    """Returns the state that a run's settings ask for: `resume`, of which `continue_training: true` is another
    spelling.

    Raises:
        UserError: it is no word, no number and no path.
    """
    asked = str(settings.get("resume") or "never")
    if settings.get("continue_training") and asked in NEVER:
        asked = AUTO
    known = asked == AUTO or asked in NEVER or asked in NEWEST or asked.isdigit()
    if not known and not Path(asked).exists():
        raise _no_checkpoint(asked)
    return asked


def find_state(asked: str, run: Path, files: StateFiles) -> Path | None:
    """Finds the state to go on from; None: begin anew. Raises UserError where the asked one is not there."""
    if asked in NEVER:
        return None
    states = files.existing(run)
    if asked == AUTO:
        newest = next((c for c in map(files.newest, [run, *files.earlier_runs(run)]) if c is not None), None)
        if newest is None:
            log.info("resume=auto: no earlier run with a checkpoint beside %s; starting afresh", run)
        return newest
    if asked in NEWEST:
        newest = files.newest(run)
        if newest is None and not (run / "metrics.jsonl").is_file():  # else it ended before its first checkpoint
            raise UserError(f"no checkpoint in {run}: train first, or check the name")
        return newest
    path = Path(asked)
    if path.exists():
        newest = path if path.is_file() else files.newest(path)
        if newest is None:
            raise _no_checkpoint(asked)
        return newest
    for number, state in states:
        if number == int(asked):
            return state
    there = ", ".join(str(number) for number, _ in states) or "none"
    raise UserError(f"resume={asked}: no checkpoint {asked} in {run}, there are: {there}{files.HINT}")


def _no_checkpoint(asked: str) -> UserError:
    return UserError(f"resume={asked}: no checkpoint there; give a run folder, a checkpoint, auto or never")


def require_state(checkpoint: Checkpoint, step_key: str, path: Path) -> None:
    """Raises UserError for a checkpoint without the state of a training."""
    if "train" not in checkpoint.metadata or step_key not in checkpoint.metadata:
        raise UserError(f"{path} holds weights only and cannot be resumed: pass it as base_policy_path instead")


@contextlib.contextmanager
def fitting(path: Any) -> Iterator[None]:
    """Turns what does not fit this configuration, while a run's state is restored from `path`, into one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"cannot resume from {path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot resume from {path}: its training state does not fit this configuration ({reason}); use the "
            f"settings it was saved with, or resume=never"
        ) from error


def announce(path: Any, unit: str, count: int) -> None:
    """Says which state a run goes on from."""
    print(f"resuming {path} after {count} {unit}s", flush=True)


# ---------- settings that changed ----------


def compare_settings(checkpoint: Checkpoint, now: Mapping[str, Any], path: Path, may_change: Sequence[str]) -> None:
    """Compares the settings of the run that a checkpoint is of with those of the run that goes on with it.

    may_change: patterns of keys whose new values take effect; what changed of them is said.

    Raises:
        UserError: another setting differs, so that the run would go on otherwise than it says.
    """
    if not recorded_config(checkpoint):
        return
    refuse_changes(_filled(recorded_config(checkpoint)), _filled(now), path, may_change)
    for _, difference in bounds_difference(checkpoint, bounds_path(now)):
        raise UserError(f"resume={path}: that run was trained with {difference}")


def refuse_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], path: Path, may_change: Sequence[str] = ()
) -> None:
    """Compares flat settings of a run with those it is resumed with. Raises UserError, or says what changed."""
    changed = [key for key in before if key not in after or not _same(key, before[key], after[key])]
    refused = [key for key in changed if not any(fnmatch.fnmatchcase(key, pattern) for pattern in may_change)]
    if refused:
        shown = ", ".join(f"{key}={before[key]} (now {after.get(key, 'left out')})" for key in refused[:4])
        raise UserError(
            f"resume={path}: that run has {shown}, which resuming cannot change: leave it, or start another run"
        )
    changed += [key for key in after if key not in before]
    notable = [key for key in changed if not any(fnmatch.fnmatchcase(key, pattern) for pattern in NEUTRAL)]
    if notable:
        facts = (f"{key}={after.get(key, 'its default')} (was {before.get(key, 'not set')})" for key in notable)
        log.warning("resumed with %s", ", ".join(facts))


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flat configuration, with the defaults of its optional keys and of its objects' arguments."""
    whole = copy.deepcopy(dict(config))
    complete(whole)
    flat = flatten(whole)
    for where, mapping in targets(whole):
        if where and str(mapping["_target_"]).startswith(PACKAGE):
            defaults = {f"{where}.{key}": value for key, value in default_arguments(mapping["_target_"]).items()}
            flat = {key: value for key, value in defaults.items() if key not in flat} | flat
    return {key: value for key, value in flat.items() if not isinstance(value, Mapping)}


def _same(key: str, one: Any, other: Any) -> bool:
    """Returns whether two values are equal; a file that lies elsewhere today is the same file by its name."""
    if one == other:
        return True
    if isinstance(one, str) and isinstance(other, str) and key.rpartition(".")[2].endswith("_path"):
        return Path(one).name == Path(other).name and Path(one).parent.name == Path(other).parent.name
    return False
