"""Data of the toy task: episodes of scripted agents that are slow, off their course and noisy."""

from __future__ import annotations

import numpy as np

from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.data.agent_windows import AgentEpisodes
from diffusion_rl.data.episodes import Episodes
from diffusion_rl.envs.toy_agents import EPISODE_STEPS, ToyAgentsVectorEnv, controller

EPISODES, SEED = 400, 20_000_003
SPEED, TURN, NOISE = 0.4, 0.6, 0.3  # mean return -17 with two agents; straight at full speed it is -6.4


def toy_data(n_agents: int = 2, discrete: bool = False) -> AgentEpisodes:
    """Makes 400 episodes, always the same ones."""
    env = ToyAgentsVectorEnv(EPISODES, n_agents, discrete=discrete, seeds=range(SEED, SEED + EPISODES))
    rng, shape = NoiseSource(SEED), (EPISODES, n_agents, 2)
    observations, rows = env.reset()["state"][:, -1], list[tuple[np.ndarray, ...]]()
    for _ in range(EPISODE_STEPS):
        drift = NOISE * rng.normal(shape)
        actions = controller(observations.reshape(EPISODES, n_agents, -1), drift, SPEED, TURN, discrete)
        result = env.step(actions.reshape(EPISODES, 1, -1))
        rows.append((observations, actions.reshape(EPISODES, -1), result.rewards))
        observations = result.observations["state"][:, -1]
    columns = (np.stack(column, axis=1) for column in zip(*rows, strict=True))
    states, acted, rewards = (x.reshape(EPISODES * EPISODE_STEPS, *x.shape[2:]).astype(np.float32) for x in columns)
    lengths = np.full(EPISODES, EPISODE_STEPS)
    return AgentEpisodes(Episodes(states, acted, lengths, rewards, np.zeros(len(states), bool)), n_agents, discrete)
