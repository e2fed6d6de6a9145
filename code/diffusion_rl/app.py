"""Configuration -> objects -> loop: what `python script/run.py` does."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_rl.config_keys import KEYS, check_arguments, check_keys, suggestion
from diffusion_rl.core.config import first_line, flatten, instantiate_trusted, register_resolvers, targets
from diffusion_rl.core.errors import UserError
from diffusion_rl.interop.reference_targets import REFERENCE_TARGETS

__all__ = ["CONFIG_ROOT", "compose", "instantiate_trusted", "main", "prepare", "run"]

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_ROOT = REPOSITORY / "cfg"
USER_ERROR, INTERRUPTED = 2, 130
EXAMPLE = "python script/run.py --config-name=ft_ppo_diffusion_mlp --config-dir=cfg/gym/finetune/hopper-v2"
USAGE = f"usage: python script/run.py --config-name=NAME --config-dir=DIR [key=value ...]   e.g. {EXAMPLE}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's own) and return its exit status.

    0 done, 2 something the user can mend (one line on stderr), 130 interrupted. Anything else that is raised is a
    defect and keeps its traceback; so does everything under HYDRA_FULL_ERROR=1.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        print(f"{USAGE}   (--help explains)", file=sys.stderr)
        return USER_ERROR
    register_resolvers()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        options = _options(arguments)
        if {"--help", "-h"} & set(arguments):
            print(_help(options))
            return 0
        _check_config_exists(arguments, options)
        with _hydra_raises():
            _hydra_main(arguments)
        return 0
    except KeyboardInterrupt:
        if wants_traceback:
            raise
        print("interrupted; resume=auto continues from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        line = None if wants_traceback else _line_for_user(error, arguments)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return USER_ERROR


def compose(config_name: str, overrides: Sequence[str] = (), *, with_hydra: bool = False) -> DictConfig:
    """The configuration `config_name`, a path below cfg/ such as "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG_ROOT), version_base="1.3"):
        return hydra.compose(config_name, list(overrides), return_hydra_config=with_hydra)


def prepare(config: DictConfig) -> DictConfig:
    """Resolve `config`, check its keys and class names, and fill in what follows from the rest.

    Neither imports TensorFlow nor writes anything. Raises UserError.
    """
    OmegaConf.resolve(config)
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    if "_target_" not in plain:
        raise UserError("the configuration has no _target_: it names no loop to run")
    for where, mapping in targets(plain):
        _check_target(f"{where}._target_".lstrip("."), mapping["_target_"])
    check_keys(plain)
    _complete_wandb(plain)
    plain["logdir"] = _run_folder(plain)
    return OmegaConf.create(plain)


def run(config: DictConfig) -> Any:
    """Build the loop that `config` describes and run it."""
    config = prepare(config)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _select_device(config.get("device"))
    check_arguments(OmegaConf.to_container(config))  # type: ignore[arg-type]
    loop = _loop_class(str(config._target_))(config)
    return loop.run()


def _loop_class(name: str) -> Any:
    try:
        return hydra.utils.get_class(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"_target_: cannot import '{name}' ({first_line(error)})") from error


def _check_target(where: str, name: Any) -> None:
    if name in REFERENCE_TARGETS:
        raise UserError(f"{where}={name} is the PyTorch reference's class; here it is {REFERENCE_TARGETS[name]}")
    if not isinstance(name, str) or "." not in name:
        raise UserError(f"{where}={name} is not the path of a class (package.module.Class)")


def _complete_wandb(config: dict[str, Any]) -> None:
    """`wandb: null` and `wandb.mode: disabled` are both null; otherwise entity, project and run get their defaults."""
    wandb = config.get("wandb")
    if not wandb or wandb.get("mode") == "disabled":
        config["wandb"] = None
        return
    env = config.get("env_name") or config.get("env")
    config["wandb"] = {
        "entity": os.environ.get("DPPO_WANDB_ENTITY"),
        "project": f"{config.get('suite')}-{env}-{config.get('stage')}",
        "run": f"{time.strftime('%H-%M-%S')}_{config['name']}",
    } | wandb


def _run_folder(config: Mapping[str, Any]) -> str:
    """`logdir`, or the folder that `resume` names; auto: the newest of this name and seed that has a checkpoint."""
    logdir, resume = str(config["logdir"]), config.get("resume") or "never"
    if resume == "never":
        return logdir
    if resume == "auto":
        if _has_checkpoint(Path(logdir)):
            return logdir
        folders = [f for f in Path(logdir).parent.glob(f"*_{config.get('seed')}") if _has_checkpoint(f)]
        return str(max(folders, key=lambda f: f.name)) if folders else logdir
    path = Path(resume)
    if not path.exists():
        raise UserError(f"resume={resume}: no such run folder or checkpoint (or use resume=auto or never)")
    if path.is_file():
        path = path.parent
    folder = path.parent if path.name == "checkpoint" else path
    if not _has_checkpoint(folder):
        raise UserError(f"resume={resume}: there is no checkpoint/state_<n>.safetensors in {folder}")
    return str(folder)


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoint/state_*.safetensors"))


def _select_device(device: str | None) -> None:
    """Show TensorFlow the GPU that `device` ("cuda:N", "cpu", null) names; without any GPU all are the processor."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    name, _, number = str(device or "cuda").partition(":")
    if name not in ("cuda", "gpu", "cpu") or (number and not number.isdigit()):
        raise UserError(f"device={device} is neither cpu nor cuda:<number>")
    if gpus and name != "cpu" and number and int(number) >= len(gpus):
        raise UserError(f"device={device}: this machine has {len(gpus)} GPUs, numbered from 0")
    if not gpus:
        return
    visible = [] if name == "cpu" else [gpus[int(number or 0)]]
    with contextlib.suppress(RuntimeError):  # a later job of a multirun: TensorFlow is already running
        tf.config.set_visible_devices(visible, "GPU")
        for gpu in visible:
            tf.config.experimental.set_memory_growth(gpu, True)


# Hydra


def _hydra_main(arguments: Sequence[str]) -> None:
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_ROOT))(_job)()
    finally:
        sys.argv = before


def _job(config: DictConfig) -> Any:
    with _hydra_raises(False):
        return run(config)


@contextlib.contextmanager
def _hydra_raises(on: bool = True) -> Iterator[None]:
    """Inside, Hydra raises its exceptions (or, with False, what the user has set) instead of printing and exiting."""
    name, own = "HYDRA_FULL_ERROR", "DIFFUSION_RL_HYDRA_FULL_ERROR"
    before = os.environ.get(name)
    if on:
        os.environ[name], os.environ[own] = "1", before or ""
    else:
        os.environ[name] = os.environ.get(own, "")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
        if on:
            os.environ.pop(own, None)


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """{"config-name": …, "config-dir": …} as far as given, in Hydra's spellings."""
    short = {"-cn": "config-name", "-cd": "config-dir", "-cp": "config-path"}
    found: dict[str, str] = {}
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        name = short.get(name, name.lstrip("-") if name.startswith("--") else "")
        if name in short.values():
            found[name] = value if equals else next(iter(arguments[i + 1 : i + 2]), "")
    return found


def _check_config_exists(arguments: Sequence[str], options: Mapping[str, str]) -> None:
    if {"--hydra-help", "--version", "--shell-completion", "-sc"} & {a.split("=")[0] for a in arguments}:
        return
    if "config-path" in options:
        return
    folder, name = options.get("config-dir"), options.get("config-name")
    if not name:
        raise UserError(f"no --config-name given; {USAGE}")
    if folder is not None and not Path(folder).is_dir():
        known = {_relative(path.parent) for path in _shipped_configs()}
        close = difflib.get_close_matches(folder.rstrip("/"), sorted(known), n=3, cutoff=0.6)
        raise UserError(f"--config-dir={folder}: no such folder" + _did_you_mean(close))
    candidates = [*(Path(d) for d in [folder] if d), CONFIG_ROOT]
    if not any((d / f"{name.removesuffix('.yaml')}.yaml").is_file() for d in candidates):
        here = sorted(path.stem for path in Path(folder or CONFIG_ROOT).glob("*.yaml"))
        close = difflib.get_close_matches(name, here, n=3, cutoff=0.5)
        place = f" in {folder}" if folder else "; it also takes --config-dir=DIR"
        rest = f" (there are: {', '.join(here)})" if here and not close else ""
        raise UserError(f"--config-name={name}: no such configuration{place}{_did_you_mean(close)}{rest}")


def _did_you_mean(matches: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _shipped_configs() -> list[Path]:
    return sorted(path for path in CONFIG_ROOT.rglob("*.yaml") if "_base" not in path.parts)


def _relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


# What people read


def _line_for_user(error: Exception, arguments: Sequence[str]) -> str | None:
    """One line for an error that the user can mend; None for a defect of ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).split("\n"))
    if isinstance(error, MissingConfigException):
        return str(error).split("\n")[0]
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _config_line(error, arguments)
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
        return f"{error.filename or 'writing'}: {error.strerror}"
    return None


def _config_line(error: Exception, arguments: Sequence[str]) -> str:
    text = first_line(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown[1]
        return f"unknown configuration key '{key}'{suggestion(key, _keys_of(arguments))}"
    if re.search(r"Unsupported interpolation type (eval|round_up|round_down)\b", text):
        text += "; for arithmetic write ${calc:'…'}, which runs no code"
    return text


def _keys_of(arguments: Sequence[str]) -> set[str]:
    """The keys of the configuration that `arguments` name, without their overrides (none if even that fails)."""
    options, keys = _options(arguments), set(KEYS)
    name = options.get("config-name", "")
    with contextlib.suppress(Exception):
        keys |= set(flatten(_compose_named(name, options.get("config-dir"))))
    return keys


def _compose_named(name: str, folder: str | None) -> DictConfig:
    inside = Path(folder).resolve() if folder else CONFIG_ROOT
    return compose(str((inside / name).relative_to(CONFIG_ROOT)).removesuffix(".yaml"))


def _help(options: Mapping[str, str]) -> str:
    name = options.get("config-name")
    if name:
        _check_config_exists([], options)
        config = flatten(_compose_named(name, options.get("config-dir")))
        width = max(len(key) for key in config)
        rows = [f"  {key:<{width}}  {_short(value):<28}{KEYS.get(key, '')}".rstrip() for key, value in config.items()]
        optional = [f"  {key:<{width}}  {text}" for key, text in KEYS.items() if key not in config]
        return "\n".join([USAGE, "", f"Keys of {name} and their values:", *rows, "", "Other keys:", *optional])
    folders: dict[str, list[str]] = {}
    for path in _shipped_configs():
        folders.setdefault(_relative(path.parent), []).append(path.stem)
    return "\n".join(
        [
            USAGE,
            "",
            "Trains, fine-tunes or evaluates the policy that a configuration describes.",
            "",
            "  --config-dir=DIR --config-name=NAME   one of the configurations below, or your own",
            "  --help with these two                 its keys, values and meanings",
            "  key=value                             any key of the configuration, e.g. seed=1 train.n_train_itr=3",
            "  +key=value                            an optional key it does not name, e.g. +wandb.mode=online",
            "  -m key=v1,v2                          one run per combination",
            "  --cfg job --resolve                   print the configuration and stop",
            "  --hydra-help                          Hydra's own options",
            "",
            "Environment: DPPO_DATA_DIR, DPPO_LOG_DIR (default data, log), DPPO_WANDB_ENTITY, HYDRA_FULL_ERROR=1 (tracebacks).",
            "Exit status: 0 done, 2 something to mend (one line says what), 130 interrupted.",
            "",
            "Configurations (DIR: NAMEs):",
            *(f"  {folder}: {', '.join(names)}" for folder, names in folders.items()),
        ]
    )


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
