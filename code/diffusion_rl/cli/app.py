"""Configuration -> objects -> loop: what `python script/run.py` does."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusion_rl.cli.status import INTERRUPTED, USER_ERROR, reported, show
from diffusion_rl.config import command_line, sweeps
from diffusion_rl.config.command_line import FULL_ERROR, set_environment
from diffusion_rl.config.compose import Config, prepare
from diffusion_rl.config.declared import declared
from diffusion_rl.config.instantiate import find_class, plain, register_resolvers
from diffusion_rl.config.keys import check_arguments
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.programs import as_here
from diffusion_rl.training import signals

__all__ = ["main", "prepare", "run"]

SMALLER = "env.n_envs, train.n_steps, train.batch_size, train.buffer_size"  # where memory is too small
_reported = functools.partial(
    reported,
    smaller=SMALLER,
    interrupted=command_line.INTERRUPTED,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (default: the process's own) and returns its exit status.

    0 done, 2 something the user can mend (one line on stderr), 130 interrupted. Anything else that is raised is a
    defect and keeps its traceback; so does everything under HYDRA_FULL_ERROR=1.
    """
    arguments = command_line.optional_wandb_keys(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        print(as_here(f"{command_line.USAGE}   (--help explains)"), file=sys.stderr)
        return USER_ERROR
    register_resolvers()
    with _reported() as status, signals.interrupting():
        options = command_line.parse(arguments)
        if options.help:
            show(command_line.help_text(options))
        else:
            _hydra_mains(arguments, options)
    return status[0]


def run(config: Config, defaults: Mapping[str, Any] | None = None) -> Any:
    """Builds the loop that `config` describes and runs it."""
    return run_prepared(prepare(config, defaults))


def run_prepared(config: Config) -> Any:
    """Builds the loop that a configuration describes, which `prepare` has completed, and runs it."""
    train = config.get("train") or {}
    n_devices = int(train.get("devices") or 1)
    _select_device(config.get("device"), n_devices)
    loop_class = find_class(config._target_)
    shared = bool(getattr(loop_class, "SHARED_OPERATIONS", False)) and not _side_by_side(config)
    check_arguments(plain(config))
    with _replicas(config, loop_class, n_devices, int(train.get("replicas") or 1), shared):
        _start_tensorflow(shared)
        return loop_class(config).run()


def _side_by_side(config: Config) -> bool:
    """Returns whether the algorithm says that its operations run side by side, one thread each."""
    model = config.get("model") or {}
    return bool(declared(str(model.get("_target_", "")), "SIDE_BY_SIDE", False))


@contextlib.contextmanager
def _replicas(config: Config, loop_class: Any, devices: int, processes: int, shared: bool) -> Iterator[None]:
    """Deals minibatches to devices of this process, or to processes of a cluster, as the configuration says."""
    if devices > 1 and processes > 1:
        raise UserError("train.devices and train.replicas exclude each other: give every replica a device of its own")
    if devices > 1:
        from diffusion_rl.core.replicas import Replicas, used
        from diffusion_rl.core.replicas import devices as names_of

        with used(Replicas(devices=names_of(devices))):
            yield
    elif processes > 1:
        from diffusion_rl.cluster.replicas import Group, sharing
        from diffusion_rl.cluster.session import ClusterSettings
        from diffusion_rl.core.threads import configure_threads

        if not hasattr(loop_class, "replica"):
            raise UserError(f"train.replicas={processes}: {loop_class.__name__} is not shared among processes")
        configure_threads(shared)  # nothing may be computed before the processes have met
        with sharing(Group(processes, ClusterSettings.of(config), loop_class.replica, plain(config))):
            yield
    else:
        yield


def _select_device(device: str | None, n: int = 1) -> None:
    """Shows TensorFlow the GPU that `device` ("cuda:N", "cpu", null) names, and the n - 1 after it; without any GPU all
    are the processor."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    name, _, number = str(device or "cuda").partition(":")
    if name not in ("cuda", "gpu", "cpu") or (number and not number.isdigit()):
        raise UserError(f"device={device} is neither cpu nor cuda:<number>")
    if gpus and name != "cpu" and int(number or 0) >= len(gpus):
        raise UserError(f"device={device}: this machine has {len(gpus)} GPUs, numbered from 0")
    if not gpus:
        return
    visible = [] if name == "cpu" else gpus[int(number or 0) :][:n]
    with contextlib.suppress(RuntimeError):  # a later job of a multirun: TensorFlow is already running
        tf.config.set_visible_devices(visible, "GPU")
        for gpu in visible:
            tf.config.experimental.set_memory_growth(gpu, True)
        tf.config.experimental.enable_tensor_float_32_execution(False)  # of three digits; PyTorch's default, too


@functools.cache
def _start_tensorflow(shared: bool) -> None:
    from diffusion_rl.core.threads import configure_threads, silence_compiler

    configure_threads(shared)
    silence_compiler()


def _hydra_mains(arguments: Sequence[str], options: Namespace) -> None:
    """Checks everything before the first run begins; one that fails does not keep the next from running."""
    swept = sweeps.swept_keys(options)
    checked = [(one, command_line.check_names(one)) for one in sweeps.configurations(options)]
    if len(checked) == 1:
        _hydra_main(command_line.overrides_last(arguments, options, checked[0][1]), checked[0][1], swept)
        return
    statuses = [0]
    for one, defaults in checked:
        with _reported() as status:
            _hydra_main(command_line.overrides_last(arguments, one, defaults), defaults, swept)
        statuses.append(status[0])
        if status[0] == INTERRUPTED:
            break
    sys.exit(max(statuses))


def _hydra_main(arguments: Sequence[str], defaults: Mapping[str, Any], swept: Sequence[str]) -> None:
    """Lets Hydra compose (once, or for each job of a multirun) and call `run`."""
    before = os.environ.get(FULL_ERROR)

    def job(config: Config) -> Any:  # a launcher may call it in another process
        register_resolvers()
        set_environment(FULL_ERROR, before)
        if sweeps.in_multirun():
            return one_of_many(config)
        with _reported() as status:
            return run(config, defaults)
        sys.exit(status[0])

    def one_of_many(config: Config) -> Any:
        sweeps.name_job(config, swept)
        label = sweeps.job_label(swept)
        try:
            with _reported(f"{label}: ") as status:
                return run(config, defaults)
        except Exception:
            traceback.print_exc()
        finally:
            set_environment(FULL_ERROR, "1")
        if status[0] == INTERRUPTED:
            sys.exit(INTERRUPTED)
        raise sweeps.JobFailed(f"{label} failed, see above; the other jobs went on")

    command_line.run_jobs(job, arguments, defaults)
