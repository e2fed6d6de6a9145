"""Configuration -> objects -> loop: what `python script/run.py` does."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from diffusion_rl.config import command_line, sweeps
from diffusion_rl.config.compose import CONFIG_ROOT, REPOSITORY
from diffusion_rl.config.instantiate import find_class, register_resolvers
from diffusion_rl.config.keys import check_arguments, check_keys
from diffusion_rl.config.ranges import check_numbers
from diffusion_rl.config.reads import interpolated
from diffusion_rl.config.targets import translate
from diffusion_rl.core.errors import Interrupted, UserError
from diffusion_rl.training import signals

__all__ = ["main", "prepare", "run"]

USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's own) and return its exit status.

    0 done, 2 something the user can mend (one line on stderr), 130 interrupted. Anything else that is raised is a
    defect and keeps its traceback; so does everything under HYDRA_FULL_ERROR=1.
    """
    arguments = command_line.optional_wandb_keys(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        print(f"{command_line.USAGE}   (--help explains)", file=sys.stderr)
        return USER_ERROR
    register_resolvers()
    with _reported(arguments) as status, signals.interrupting():
        options = command_line.parse(arguments)
        if options.help:
            print(command_line.help_text(options))
        else:
            _hydra_mains(arguments, options)
    return status[0]


def prepare(config: DictConfig, defaults: Mapping[str, Any] | None = None) -> DictConfig:
    """Resolve `config`, check its keys and class names, and fill in what follows from the rest.

    `defaults`: the flat configuration without overrides, for the types of values. Neither imports TensorFlow nor
    writes anything. Raises UserError.
    """
    _find_data(config)
    used = interpolated(OmegaConf.to_container(config))
    OmegaConf.resolve(config)
    missing = sorted(OmegaConf.missing_keys(config), key=lambda key: (key.count("."), key))
    if missing:
        raise UserError(f"{missing[0]} has no value: give {missing[0]}=… on the command line")
    plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    if "_target_" not in plain:
        raise UserError("the configuration has no _target_: it names no loop to run")
    translate(plain)
    check_keys(plain, defaults or {}, used)
    check_numbers(plain)
    _complete_wandb(plain)
    return OmegaConf.create(plain)


def run(config: DictConfig, defaults: Mapping[str, Any] | None = None) -> Any:
    """Build the loop that `config` describes and run it."""
    config = prepare(config, defaults)
    _select_device(config.get("device"))
    loop_class = find_class(config._target_)
    _start_tensorflow(bool(getattr(loop_class, "SHARED_OPERATIONS", False)))
    check_arguments(OmegaConf.to_container(config))  # type: ignore[arg-type]
    return loop_class(config).run()


def _find_data(config: DictConfig) -> None:
    """Started in another folder than the repository's, the default data folder is still the repository's."""
    folder = Path(str(config.get("data_dir", ".")))
    shipped = REPOSITORY / folder
    if "DPPO_DATA_DIR" not in os.environ and not folder.exists() and shipped.is_dir():
        config.data_dir = str(shipped)


def _complete_wandb(config: dict[str, Any]) -> None:
    """`wandb: null` and `wandb.mode: disabled` are both null; otherwise entity, project and run get their defaults."""
    wandb = config.get("wandb")
    if not wandb or wandb.get("mode") == "disabled":
        config["wandb"] = None
        return
    env = config.get("env_name") or config.get("env")
    defaults = {
        "entity": os.environ.get("DPPO_WANDB_ENTITY"),
        "project": config.get("project") or f"{config.get('suite')}-{env}-{config.get('stage')}",
        "run": f"{time.strftime('%H-%M-%S')}_{config.get('name')}",
    }
    config["wandb"] = defaults | {key: value for key, value in wandb.items() if value is not None}


def _select_device(device: str | None) -> None:
    """Show TensorFlow the GPU that `device` ("cuda:N", "cpu", null) names; without any GPU all are the processor."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    name, _, number = str(device or "cuda").partition(":")
    if name not in ("cuda", "gpu", "cpu") or (number and not number.isdigit()):
        raise UserError(f"device={device} is neither cpu nor cuda:<number>")
    if gpus and name != "cpu" and int(number or 0) >= len(gpus):
        raise UserError(f"device={device}: this machine has {len(gpus)} GPUs, numbered from 0")
    if not gpus:
        return
    visible = [] if name == "cpu" else [gpus[int(number or 0)]]
    with contextlib.suppress(RuntimeError):  # a later job of a multirun: TensorFlow is already running
        tf.config.set_visible_devices(visible, "GPU")
        for gpu in visible:
            tf.config.experimental.set_memory_growth(gpu, True)


@functools.cache
def _start_tensorflow(shared: bool) -> None:
    from diffusion_rl.core.threads import configure_threads, silence_compiler

    configure_threads(shared)
    silence_compiler()


@contextlib.contextmanager
def _reported(arguments: Sequence[str], label: str = "") -> Iterator[list[int]]:
    """Turns what the user can mend into one line on stderr. Yields [exit status], filled in at the end.

    label: what to begin the line with, where there are several runs.
    """
    status = [0]
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        yield status
    except SystemExit as end:
        status[0] = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt as stopped:
        if wants_traceback:
            raise
        told = str(stopped) if isinstance(stopped, Interrupted) else ""
        print(told or command_line.INTERRUPTED, file=sys.stderr)
        status[0] = INTERRUPTED
    except Exception as error:
        line = None if wants_traceback else command_line.line_for_user(error, arguments)
        if line is None:
            raise
        print(f"error: {label}{line}", file=sys.stderr, flush=True)
        status[0] = USER_ERROR


def _hydra_mains(arguments: Sequence[str], options: Namespace) -> None:
    """Everything is checked before the first run begins; one that fails does not keep the next from running."""
    swept = sweeps.swept_keys(options)
    checked = [(one, command_line.check_names(one)) for one in sweeps.configurations(options)]
    if len(checked) == 1:
        _hydra_main(command_line.overrides_last(arguments, options, checked[0][1]), checked[0][1], swept)
        return
    statuses = [0]
    for one, defaults in checked:
        with _reported(arguments) as status:
            _hydra_main(command_line.overrides_last(arguments, one, defaults), defaults, swept)
        statuses.append(status[0])
        if status[0] == INTERRUPTED:
            break
    sys.exit(max(statuses))


def _hydra_main(arguments: Sequence[str], defaults: Mapping[str, Any], swept: Sequence[str]) -> None:
    """Hydra composes (once, or for each job of a multirun) and calls `run`."""
    before = os.environ.get("HYDRA_FULL_ERROR")

    def job(config: DictConfig) -> Any:  # a launcher may call it in another process
        register_resolvers()
        _set_environment("HYDRA_FULL_ERROR", before)
        if sweeps.in_multirun():
            return one_of_many(config)
        with _reported(arguments) as status:
            return run(config, defaults)
        sys.exit(status[0])

    def one_of_many(config: DictConfig) -> Any:
        sweeps.name_job(config, swept)
        label = sweeps.job_label(swept)
        try:
            with _reported(arguments, f"{label}: ") as status:
                return run(config, defaults)
        except Exception:
            traceback.print_exc()
        finally:
            _set_environment("HYDRA_FULL_ERROR", "1")
        if status[0] == INTERRUPTED:
            sys.exit(INTERRUPTED)
        raise sweeps.JobFailed(f"{label} failed, see above; the other jobs went on")

    argv = sys.argv
    sys.argv = [argv[0], *command_line.without_hydra_files(arguments)]
    _set_environment("HYDRA_FULL_ERROR", "1")  # Hydra then raises its errors; else it would print them and exit
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_ROOT))(job)()
    finally:
        sys.argv = argv
        _set_environment("HYDRA_FULL_ERROR", before)


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
