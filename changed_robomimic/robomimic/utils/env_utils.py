"""Environments from the metadata that robomimic's data sets carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robomimic.envs.env_base import EnvType


def get_env_type(env_meta: Mapping[str, Any] | None = None, env_type: int | None = None) -> int:
    """The kind of environment, from the metadata or as given."""
    if env_type is not None:
        return env_type
    if env_meta is None or "type" not in env_meta:
        raise ValueError("give env_meta with an entry 'type', or env_type")
    return int(env_meta["type"])


def check_env_type(type_to_check: int, env_meta: Mapping[str, Any] | None = None, env_type: int | None = None) -> bool:
    """Whether an environment is of the kind `type_to_check`."""
    return get_env_type(env_meta, env_type) == type_to_check


def get_env_class(env_meta: Mapping[str, Any] | None = None, env_type: int | None = None) -> type:
    """The class that runs such environments. Raises NotImplementedError for any but robosuite's."""
    kind = get_env_type(env_meta, env_type)
    if kind != EnvType.ROBOSUITE_TYPE:
        raise NotImplementedError(f"environments of type {kind}: this subset of robomimic has robosuite's (1) alone")
    from robomimic.envs.env_robosuite import EnvRobosuite  # needs the simulator

    return EnvRobosuite


def create_env(
    env_type: int,
    env_name: str,
    render: bool = False,
    render_offscreen: bool = False,
    use_image_obs: bool = False,
    **kwargs: Any,
) -> Any:
    """The environment `env_name`; `kwargs` go to the simulator."""
    return get_env_class(env_type=env_type)(
        env_name=env_name,
        render=render,
        render_offscreen=render_offscreen,
        use_image_obs=use_image_obs,
        postprocess_visual_obs=True,
        **kwargs,
    )


def create_env_from_metadata(
    env_meta: Mapping[str, Any],
    env_name: str | None = None,
    render: bool = False,
    render_offscreen: bool = False,
    use_image_obs: bool = False,
) -> Any:
    """The environment that `env_meta` ({"env_name", "type", "env_kwargs"}) describes."""
    return create_env(
        env_type=get_env_type(env_meta),
        env_name=env_meta["env_name"] if env_name is None else env_name,
        render=render,
        render_offscreen=render_offscreen,
        use_image_obs=use_image_obs,
        **env_meta["env_kwargs"],
    )
