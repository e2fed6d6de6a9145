"""Builds vector environments from the `env` node of a configuration.

Every simulator is a module of this folder, named in `tasks.registry`, with one of these functions or both:

    vector(request: EnvRequest) -> VectorEnv           all environments together
    single(recipe: EnvRecipe) -> gymnasium.Env         one of them, in a process of its own; then also
    require(name: str) -> None                         raises UserError where it cannot be made here
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from diffusion_rl.config.instantiate import plain
from diffusion_rl.core.errors import UserError
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.envs import robomimic, room, video
from diffusion_rl.envs.interface import EnvRequest, VectorEnv
from diffusion_rl.envs.vector import ProcessVectorEnv
from diffusion_rl.envs.worker import EnvRecipe, simulator_named

ENGINES = ("mujoco", "gymnasium", "d4rl")


@dataclasses.dataclass(frozen=True)
class EnvPlan:
    """What is needed to build environments anywhere: besides the package, only robomimic's description of a task.

    Attributes:
        request: which environments.
        simulator: module of `envs` that builds them.
        engine: one of `ENGINES`.
        action_dim: A of the configuration.
    """

    request: EnvRequest
    simulator: str
    engine: str
    action_dim: int

    def build(self) -> VectorEnv:
        """Builds the environments. Raises UserError where they have other dimensions than the configuration."""
        venv = _made(self.request, self.simulator, self.engine)
        try:
            _check_dims(self.request.name, venv, self.request.obs_dim, self.action_dim)
        except UserError:
            venv.close()
            raise
        return venv

    def part(self, rows: slice, **settings: Any) -> EnvPlan:
        """Returns the plan of some of the environments. settings: of the `env` node, instead of the configured ones."""
        request = dataclasses.replace(
            self.request, seeds=self.request.seeds[rows], config={**self.request.config, **settings}
        )
        return dataclasses.replace(self, request=request)


def make_vector_env(env_cfg: Mapping[str, Any], **facts: Any) -> VectorEnv:
    """Builds the environments of a run, environment i seeded with seed + i.

    Arguments and errors as of `plan_vector_env`.
    """
    plan = plan_vector_env(env_cfg, **facts)
    if plan.request.window:
        video.require_display()
    return plan.build()


def plan_vector_env(
    env_cfg: Mapping[str, Any],
    *,
    obs_dim: int,
    action_dim: int,
    act_steps: int,
    seed: int,
    n_envs: int | None = None,
    threads: int | None = None,
) -> EnvPlan:
    """Reads the description of the environments of a run, environment i seeded with seed + i.

    env_cfg, under the reference's keys: `name`, `n_envs`, `max_episode_steps`, `wrappers` with
    `multi_step.{n_obs_steps, n_action_steps, max_episode_steps, reset_within_step}` and
    `mujoco_locomotion_lowdim.normalization_path` (or `d3il_lowdim`), `specific` (keyword arguments of the environment),
    `save_full_observations`, `render` (a window), `env_type` (furniture: Furniture-Bench), those of robomimic
    (envs/robomimic.py); ours: `engine` ("mujoco" batches the locomotion tasks, "gymnasium" gives every environment a
    process, "d4rl" too, with D4RL's own simulators), `threads` (default 2), `d4rl_time_limit` (null: a time-out is
    truncation alone), `worker_timeout` (seconds that a process may take to answer, default 600).
    n_envs, threads: override the configured ones. Raises UserError for unknown engines, contradictions, or more
    environments than this machine has room for.
    """
    config = dict(plain(env_cfg))  # its interpolations resolved: workers do not know OmegaConf
    config |= {} if threads is None else {"threads": threads}
    name, count = str(config["name"]), config["n_envs"] if n_envs is None else n_envs
    engine = config.get("engine", "mujoco")
    if engine not in ENGINES:
        raise UserError(f"env.engine={engine!r} is unknown: choose one of {', '.join(ENGINES)}")
    chunks = (config.get("wrappers") or {}).get("multi_step") or {}
    configured = chunks.get("n_action_steps", act_steps)
    if configured != act_steps:
        raise UserError(f"env.wrappers.multi_step.n_action_steps={configured}, act_steps={act_steps}: make them equal")
    room.require_memory(count, room.ROW_GB)  # before anything is made that is as long
    request = EnvRequest(
        name=name,
        config=config,
        seeds=[seed + i for i in range(count)],
        act_steps=act_steps,
        chunks={
            "n_obs_steps": chunks.get("n_obs_steps", 1),
            "max_episode_steps": chunks.get("max_episode_steps", config.get("max_episode_steps")),
            "reset_within_step": chunks.get("reset_within_step", False),
            "full_observations": config.get("save_full_observations", chunks.get("pass_full_observations", False)),
        },
        normalizer=_normalizer(config.get("wrappers") or {}, obs_dim, action_dim),
        obs_dim=obs_dim,
    )
    return EnvPlan(request, _simulator(request), engine, action_dim)


def _normalizer(wrappers: Mapping[str, Any], obs_dim: int, action_dim: int) -> MinMaxNormalizer | None:
    """Reads the bounds named by the low-dimensional wrapper of the configuration; None if it has no such wrapper."""
    for wrapper, options in wrappers.items():
        if wrapper.endswith(("_lowdim", "_image")) and options and options.get("normalization_path"):
            return MinMaxNormalizer.from_npz(options["normalization_path"], obs_dim, action_dim)
    return None


def _simulator(request: EnvRequest) -> str:
    """Finds the module that builds the environments: by the configuration, or else by the name."""
    if request.config.get("env_type") == "furniture":
        return "furniture"
    if any(wrapper in (request.config.get("wrappers") or {}) for wrapper in robomimic.WRAPPERS):
        return "robomimic"
    return simulator_named(request.name)


def _made(request: EnvRequest, simulator: str, engine: str) -> VectorEnv:
    """Builds all environments together where that is possible and asked for, or else in processes."""
    module = importlib.import_module(f"{__package__}.{simulator}")
    if hasattr(module, "vector") and (engine == "mujoco" or not hasattr(module, "single")):
        return module.vector(request)
    if engine == "d4rl":
        simulator, module = engine, importlib.import_module(f"{__package__}.{engine}")
    module.require(request.name)
    builders = [EnvRecipe.of(request, simulator)] * len(request.seeds)
    if request.window:
        if engine == "d4rl" or builders[0].render:
            rival = "env.save_video=true" if builders[0].render else "env.engine=d4rl"
            raise UserError(f"env.render=true and {rival} exclude each other here: leave one of them out")
        builders[0] = dataclasses.replace(builders[0], window=True)
    return ProcessVectorEnv(builders, request.act_steps, request.seeds, request.worker_timeout)


def _check_dims(name: str, venv: VectorEnv, obs_dim: int, action_dim: int) -> None:
    """Raises UserError if the configuration's dimensions are not the environment's."""
    state = venv.obs_spec.get("state")
    if state is not None and tuple(state) != (obs_dim,):
        size = state[0] if len(state) == 1 else state
        raise UserError(
            f"obs_dim={obs_dim} is wrong for {name}: its observations have {size} entries, set obs_dim={size}"
        )
    if venv.action_dim != action_dim:
        size = venv.action_dim
        raise UserError(f"action_dim={action_dim} is wrong for {name}, which has {size}: set action_dim={size}")
