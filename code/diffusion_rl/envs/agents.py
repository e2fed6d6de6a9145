"""Vector environments of several agents: observations [E,To,N*O] and actions [E,Ta,N*A] agent by agent."""

from __future__ import annotations

from collections.abc import Sequence

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.interface import VectorEnv
from diffusion_rl.envs.toy_agents import ToyAgentsVectorEnv

ENV_TYPES = ("toy", "d4rl", "mpe", "smac", "smacv2", "mamujoco", "mahalfcheetah")


def make_agent_env(
    env_type: str,
    dataset: str,
    n_envs: int,
    *,
    n_agents: int,
    obs_dim: int,
    action_dim: int,
    act_steps: int,
    max_path_length: int,
    seed: int,
) -> VectorEnv:
    """Environments that execute chunks, begin the next episode by themselves and tell every observation on the way.

    Args:
        dataset: toy, toy-discrete; a D4RL or gymnasium name; simple_spread-<quality>.
        n_agents, obs_dim, action_dim: N, O, A of the data.
        max_path_length: time limit.

    Raises:
        UserError: the simulator is not there, or it is another task than the data's.
    """
    if env_type not in ENV_TYPES:
        raise UserError(f"env_type {env_type!r} is unknown: choose one of {', '.join(ENV_TYPES)}")
    seeds = [seed + i for i in range(n_envs)]
    if env_type == "toy":
        discrete = dataset.startswith("toy-discrete")
        venv: VectorEnv = ToyAgentsVectorEnv(
            n_envs, n_agents, discrete=discrete, act_steps=act_steps, max_episode_steps=max_path_length, seeds=seeds
        )
    elif env_type == "d4rl":
        venv = _single_agent(dataset, seeds, n_agents * obs_dim, n_agents * action_dim, act_steps, max_path_length)
    elif env_type == "mpe":
        from diffusion_rl.envs.mpe import make_mpe_env  # an extra

        venv = make_mpe_env(dataset, seeds, act_steps, max_path_length)
    else:
        raise UserError(
            f"env_type {env_type}: its simulator is not supported here, only its data are; train with "
            "online_training false and eval_freq 0"
        )
    expected, actual = (n_agents * obs_dim, n_agents * action_dim), (venv.obs_spec["state"][0], venv.action_dim)
    if expected != actual:
        venv.close()
        raise UserError(
            f"{dataset}: the data have {expected[0]} observations and {expected[1]} actions of {n_agents} agents, the "
            f"environment {actual[0]} and {actual[1]}; check dataset and n_agents"
        )
    return venv


def _single_agent(
    dataset: str, seeds: Sequence[int], obs_dim: int, action_dim: int, act_steps: int, limit: int
) -> VectorEnv:
    from diffusion_rl.envs.make import make_vector_env  # gymnasium is an extra

    chunks = {"n_obs_steps": 1, "n_action_steps": act_steps, "max_episode_steps": limit, "reset_within_step": True}
    env = {
        "name": dataset,
        "n_envs": len(seeds),
        "max_episode_steps": limit,
        "save_full_observations": True,
        "threads": 1,
        "wrappers": {"multi_step": chunks},
    }
    return make_vector_env(env, obs_dim=obs_dim, action_dim=action_dim, act_steps=act_steps, seed=seeds[0])
