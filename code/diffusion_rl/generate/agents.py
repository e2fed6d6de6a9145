"""Data of scripted agents: of the toy task, and of simple_spread in the published layout (`data.sources.agents`).

Shape letters: E episodes, T steps, N agents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from diffusion_rl.config.overrides import Arguments
from diffusion_rl.config.schema import require_range
from diffusion_rl.core.files import atomic_file, require_writable
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.places import data_dir
from diffusion_rl.data.agent_windows import AgentEpisodes
from diffusion_rl.data.episodes import Episodes
from diffusion_rl.envs import toy_agents
from diffusion_rl.envs.interface import VectorEnv
from diffusion_rl.envs.mpe import N_AGENTS, SpreadVectorEnv, scripted

# Toy agents: largest speed, radians off their course, deviation of the noise. The mean return of two of them is -17;
# straight at full speed it is -6.4.
EPISODES, SEED = 400, 20_000_003
SPEED, TURN, NOISE = 0.4, 0.6, 0.3

# Agents of simple_spread: force for each unit of distance, and deviation of its noise.
QUALITIES = {"expert": (6.0, 0.1), "medium": (1.0, 0.5)}
EPISODE_STEPS = 25
FIELDS = ("obs", "acs", "rews", "dones")


def _run(
    env: VectorEnv, n_agents: int, steps: int, act: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs an episode of T steps in each environment.

    Args:
        act: observations [E,N,O] -> actions [E,N,A].

    Returns:
        observations [E,T,N,O], actions [E,T,N,A], rewards [E,T], or those of each agent [E,T,N] where they are known.
    """
    seen, rows = env.reset()["state"][:, -1], []
    for _ in range(steps):
        observations = seen.reshape(env.n_envs, n_agents, -1)
        actions = act(observations)
        result = env.step(actions.reshape(env.n_envs, 1, -1))
        rows.append((observations, actions, result.infos.get("agent_rewards", result.rewards)))
        seen = result.observations["state"][:, -1]
    observations, actions, rewards = (np.stack(column, axis=1) for column in zip(*rows, strict=True))
    return observations, actions, rewards


def toy_data(n_agents: int = 2, discrete: bool = False) -> AgentEpisodes:
    """Makes 400 episodes of the toy task, always the same ones, by agents that are slow, off their course and noisy."""
    env = toy_agents.ToyAgentsVectorEnv(EPISODES, n_agents, discrete=discrete, seeds=range(SEED, SEED + EPISODES))
    rng, steps = NoiseSource(SEED), toy_agents.EPISODE_STEPS

    def act(observations: np.ndarray) -> np.ndarray:
        noise = NOISE * rng.normal((EPISODES, n_agents, 2))
        return toy_agents.controller(observations, noise, SPEED, TURN, discrete)

    columns = _run(env, n_agents, steps, act)
    states, actions, rewards = (x.reshape(EPISODES * steps, -1).astype(np.float32) for x in columns)
    ends = np.zeros(len(states), bool)  # by the time limit alone
    episodes = Episodes(states, actions, np.full(EPISODES, steps), rewards[:, 0], ends)
    return AgentEpisodes(episodes, n_agents, discrete)


def main(arguments: Sequence[str]) -> None:
    """Records episodes into `<data>/mpe/simple_spread/<quality>/seed_0_data/`; prints their mean return."""
    parser = Arguments(description="Data of simple_spread by scripted agents.")
    parser.add_argument("--quality", choices=QUALITIES, default="medium", help="how good the agents are")
    parser.add_argument("--episodes", type=int, default=1000, help="of 25 steps")
    parser.add_argument("--data_dir", help="default: where the data of this repository are")
    options = parser.parse_args(list(arguments))
    require_range("--episodes", options.episodes, 1, 1_000_000)
    folder = Path(options.data_dir or data_dir()) / "mpe" / "simple_spread" / options.quality / "seed_0_data"
    require_writable(folder / "obs_0.npy")
    fields, returns = record(options.episodes, *QUALITIES[options.quality])
    for name, arrays in fields.items():
        for agent, array in enumerate(arrays):
            with atomic_file(folder / f"{name}_{agent}.npy") as file:
                np.save(file, array, allow_pickle=False)
    print(f"{folder}: {options.episodes} episodes, mean return {returns.mean():.2f} +/- {returns.std():.2f}")


def record(episodes: int, push: float, deviation: float) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
    """Returns each agent's arrays [T,…] by name, episode after episode, and the episodes' mean returns over agents."""
    env, rng = SpreadVectorEnv(episodes, seeds=range(episodes)), NoiseSource(0)

    def act(observations: np.ndarray) -> np.ndarray:
        return scripted(observations, deviation * rng.normal((episodes, N_AGENTS, 2)), push)

    columns = _run(env, N_AGENTS, EPISODE_STEPS, act)
    env.close()
    rewards = columns[2]
    last = np.broadcast_to(np.arange(EPISODE_STEPS)[:, None] == EPISODE_STEPS - 1, rewards.shape)
    flat = [x.reshape(-1, *x.shape[2:]).astype(np.float32) for x in (*columns, last)]
    arrays = {name: [x[:, i] for i in range(N_AGENTS)] for name, x in zip(FIELDS, flat, strict=True)}
    return arrays, rewards.sum(axis=1).mean(axis=1)
