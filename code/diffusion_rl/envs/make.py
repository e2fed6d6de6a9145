"""From the `env` node of a configuration to a vector environment."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Mapping
from typing import Any

import gymnasium

from diffusion_rl.config.instantiate import plain
from diffusion_rl.config.schema import near_words
from diffusion_rl.core.errors import UserError
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.envs import d4rl, kitchen, processes, robomimic, room, worker
from diffusion_rl.envs.vector import WORKER_TIMEOUT, ProcessVectorEnv, VectorEnv

LONGEST_TIMEOUT = 10**6  # seconds
ENGINES = ("mujoco", "gymnasium", "d4rl")


def make_vector_env(
    env_cfg: Mapping[str, Any],
    *,
    obs_dim: int,
    action_dim: int,
    act_steps: int,
    seed: int,
    n_envs: int | None = None,
    threads: int | None = None,
) -> VectorEnv:
    """Build the environments of a run, environment i seeded with seed + i.

    env_cfg, under the reference's keys: `name`, `n_envs`, `max_episode_steps`, `wrappers` with
    `multi_step.{n_obs_steps, n_action_steps, max_episode_steps, reset_within_step}` and
    `mujoco_locomotion_lowdim.normalization_path` (or `d3il_lowdim`), `specific` (keyword arguments of the environment),
    `save_full_observations`, `render` (avoiding: a window), `env_type` (furniture: Furniture-Bench), those of robomimic
    (envs/robomimic.py); ours: `engine` ("mujoco" batches the locomotion tasks, "gymnasium" gives every environment a
    process, "d4rl" too, with D4RL's own simulators), `threads` (default 2), `d4rl_time_limit` (null: a time-out is
    truncation alone), `worker_timeout` (seconds that a process may take to answer, default 600).
    n_envs, threads: override the configured ones. Raises UserError for unknown names, wrong dimensions, or more
    environments than this machine has room for.
    """
    env_cfg = _plain(env_cfg)
    name = str(env_cfg["name"])
    count = env_cfg["n_envs"] if n_envs is None else n_envs
    if env_cfg.get("env_type") == "furniture":
        return _checked(_furniture(env_cfg, count, act_steps), name, obs_dim, action_dim)
    wrappers = env_cfg.get("wrappers") or {}
    chunks = wrappers.get("multi_step") or {}
    configured = chunks.get("n_action_steps", act_steps)
    if configured != act_steps:
        raise UserError(f"env.wrappers.multi_step.n_action_steps={configured}, act_steps={act_steps}: make them equal")
    engine = env_cfg.get("engine", "mujoco")
    if engine not in ENGINES:
        raise UserError(f"env.engine={engine!r} is unknown: choose one of {', '.join(ENGINES)}")
    chunk_options = {
        "act_steps": act_steps,
        "n_obs_steps": chunks.get("n_obs_steps", 1),
        "max_episode_steps": chunks.get("max_episode_steps", env_cfg.get("max_episode_steps")),
        "reset_within_step": chunks.get("reset_within_step", False),
        "full_observations": env_cfg.get("save_full_observations", chunks.get("pass_full_observations", False)),
        "normalizer": _normalizer(wrappers, obs_dim, action_dim),
    }
    room.require_memory(count, room.ROW_GB)
    seeds = [seed + i for i in range(count)]
    if name.startswith("avoiding"):
        venv: VectorEnv = _avoiding(env_cfg, count, chunk_options)
    elif any(one in wrappers for one in robomimic.WRAPPERS):
        venv = _robomimic(env_cfg, seeds, chunk_options)
    elif engine == "mujoco" and _is_locomotion(name):
        venv = _locomotion(env_cfg, count, seeds, threads, chunk_options)
    else:
        venv = _processes(env_cfg, seeds, chunk_options, obs_dim)
    return _checked(venv, name, obs_dim, action_dim)


def _checked(venv: VectorEnv, name: str, obs_dim: int, action_dim: int) -> VectorEnv:
    try:
        _check_dims(name, venv, obs_dim, action_dim)
    except UserError:
        venv.close()
        raise
    return venv


def _furniture(env_cfg: Mapping[str, Any], n_envs: int, act_steps: int) -> VectorEnv:
    from diffusion_rl.envs.furniture import FurnitureVectorEnv

    return FurnitureVectorEnv(env_cfg.get("specific") or {}, n_envs, act_steps, env_cfg["max_episode_steps"])


def _plain(env_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The node as plain dicts, its interpolations resolved, so that workers need not know OmegaConf."""
    return dict(plain(env_cfg))


def _normalizer(wrappers: Mapping[str, Any], obs_dim: int, action_dim: int) -> MinMaxNormalizer | None:
    """The bounds named by the low-dimensional wrapper of the configuration, None if it has no such wrapper."""
    for wrapper, options in wrappers.items():
        if wrapper.endswith(("_lowdim", "_image")) and options and options.get("normalization_path"):
            return MinMaxNormalizer.from_npz(options["normalization_path"], obs_dim, action_dim)
    return None


def _robomimic(env_cfg: Mapping[str, Any], seeds: list[int], options: dict[str, Any]) -> VectorEnv:
    chunks = {key: value for key, value in options.items() if key not in ("act_steps", "normalizer")}
    builders = robomimic.recipes(env_cfg, seeds, options["normalizer"], chunks)
    processes.preload("diffusion_rl.envs.quiet_robosuite")
    return ProcessVectorEnv(builders, options["act_steps"], seeds, _worker_timeout(env_cfg))


def _worker_timeout(env_cfg: Mapping[str, Any]) -> float:
    seconds = env_cfg.get("worker_timeout", WORKER_TIMEOUT)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < LONGEST_TIMEOUT:
        raise UserError(f"env.worker_timeout={seconds}: give seconds, more than 0 and less than {LONGEST_TIMEOUT}")
    return float(seconds)


def _is_locomotion(name: str) -> bool:
    return name.startswith(worker.LOCOMOTION_PREFIXES)


def _locomotion(
    env_cfg: Mapping[str, Any], n_envs: int, seeds: list[int], threads: int | None, options: dict[str, Any]
) -> VectorEnv:
    from diffusion_rl.envs import locomotion  # needs the simulator, which other environments do not

    name = str(env_cfg["name"])
    _check_locomotion(name)
    return locomotion.LocomotionVectorEnv(
        name,
        n_envs,
        seeds=seeds,
        threads=env_cfg.get("threads", 2) if threads is None else threads,
        d4rl_time_limit=env_cfg.get("d4rl_time_limit", d4rl.D4RL_EPISODE_STEPS),
        **options,
    )


def _avoiding(env_cfg: Mapping[str, Any], n_envs: int, options: dict[str, Any]) -> VectorEnv:
    from diffusion_rl.envs.d3il_avoiding import AvoidingVectorEnv

    return AvoidingVectorEnv(str(env_cfg["name"]), n_envs, render=bool(env_cfg.get("render", False)), **options)


def _processes(env_cfg: Mapping[str, Any], seeds: list[int], options: dict[str, Any], obs_dim: int) -> VectorEnv:
    name = str(env_cfg["name"])
    original, is_kitchen = env_cfg.get("engine") == "d4rl", name.startswith(kitchen.PREFIX)
    if original:
        d4rl.require()
    if is_kitchen and not original:
        kitchen.check_available(name)
    elif original or _is_locomotion(name):
        _check_locomotion(name)
    else:
        _check_registered(name)
    limit = kitchen.EPISODE_STEPS if is_kitchen else d4rl.D4RL_EPISODE_STEPS
    chunks = {key: value for key, value in options.items() if key not in ("act_steps", "normalizer")}
    recipe = worker.EnvRecipe(
        name=name,
        kwargs=dict(env_cfg.get("specific") or {}),
        chunks=chunks,
        normalizer=options["normalizer"],
        render=bool(env_cfg.get("save_video", False)),
        d4rl_time_limit=env_cfg.get("d4rl_time_limit", limit),
        original=original,
        obs_dim=obs_dim,
    )
    return ProcessVectorEnv([recipe] * len(seeds), options["act_steps"], seeds, _worker_timeout(env_cfg))


def _check_locomotion(name: str) -> None:
    from diffusion_rl.envs import locomotion

    if locomotion.task_of(name) is None:
        raise _unknown(name, locomotion.known_names())


def _check_registered(name: str) -> None:
    """Raise UserError now, rather than from a worker, if gymnasium does not know the id."""
    module, _, registered = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"environment {name!r}: cannot import {module} ({error}); is it on PYTHONPATH?") from error
        except Exception as error:
            cause = processes.in_one_line("".join(traceback.format_exception(error)))
            raise UserError(f"environment {name!r}: importing {module} failed: {cause}") from error
    try:
        gymnasium.spec(registered)
    except gymnasium.error.Error as error:
        examples = [f"{task}medium-v2" for task in worker.LOCOMOTION_PREFIXES]
        raise _unknown(registered, [*examples, *gymnasium.registry]) from error


def _unknown(name: str, known: list[str]) -> UserError:
    close = near_words(name, known, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "give a D4RL name (hopper-medium-v2) or a gymnasium id"
    return UserError(f"environment {name!r} is unknown: {hint}")


def _check_dims(name: str, venv: VectorEnv, obs_dim: int, action_dim: int) -> None:
    """One clear line if the configuration's dimensions are not the environment's."""
    state = venv.obs_spec.get("state")
    if state is not None and tuple(state) != (obs_dim,):
        found = state[0] if len(state) == 1 else state
        raise UserError(
            f"obs_dim={obs_dim} is wrong for {name}: its observations have {found} entries, set obs_dim={found}"
        )
    if venv.action_dim != action_dim:
        found = venv.action_dim
        raise UserError(f"action_dim={action_dim} is wrong for {name}, which has {found}: set action_dim={found}")
