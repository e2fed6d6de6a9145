"""Data of simple_spread by scripted agents, in the published layout (`data.sources.agents`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion_rl.config.overrides import Arguments
from diffusion_rl.config.schema import require_range
from diffusion_rl.core.files import atomic_file, require_writable
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.data.assets import data_dir
from diffusion_rl.envs.mpe import N_AGENTS, SpreadVectorEnv, scripted

# What the agents are like: force for each unit of distance, and deviation of its noise.
QUALITIES = {"expert": (6.0, 0.1), "medium": (1.0, 0.5)}
EPISODE_STEPS = 25


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
    seen, rows = env.reset()["state"][:, -1], []
    for step in range(EPISODE_STEPS):
        observations = seen.reshape(episodes, N_AGENTS, -1)
        drift = deviation * rng.normal((episodes, N_AGENTS, 2))
        actions = scripted(observations, drift, push)
        result = env.step(actions.reshape(episodes, 1, -1))
        last = np.full((episodes, N_AGENTS), step == EPISODE_STEPS - 1)
        rows.append((observations, actions, result.infos["agent_rewards"], last))
        seen = result.observations["state"][:, -1]
    env.close()
    columns = [np.stack(column, axis=1) for column in zip(*rows, strict=True)]  # [episodes,25,N,…]
    returns = columns[2].sum(axis=1).mean(axis=1)
    flat = [x.reshape(episodes * EPISODE_STEPS, N_AGENTS, *x.shape[3:]).astype(np.float32) for x in columns]
    names = ("obs", "acs", "rews", "dones")
    return {name: [x[:, agent] for agent in range(N_AGENTS)] for name, x in zip(names, flat, strict=True)}, returns
