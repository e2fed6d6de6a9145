"""Evaluation of VAE + Diffusion RL: whole episodes with the averaged weights, and their JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.files import write_json
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.methods.vae_latent.history import AgentHistoryEnv
from diffusion_rl.methods.vae_latent.model import LatentDiffusionRL
from diffusion_rl.policies.acting import DiffusionActor

EVALUATION_SEED = 10_000_019  # apart from those of training


@dataclass(frozen=True)
class AgentReturns:
    """Of n episodes: returns [n] (means over the agents), of each agent [n,N], and whether they were won [n]."""

    returns: np.ndarray
    by_agent: np.ndarray
    won: np.ndarray | None = None


def decoder(algorithm: LatentDiffusionRL) -> Callable[[np.ndarray], np.ndarray]:
    """Latents [B,H,N*Z] as actions or logits [B,H,N*A]."""
    compiled = tf.function(algorithm.decode, autograph=False, reduce_retracing=True)
    return lambda latents: compiled(tf.constant(latents, algorithm.dtype)).numpy()


def evaluating_actor(algorithm: LatentDiffusionRL, cfg: Mapping[str, Any]) -> DiffusionActor:
    """Acts with the averaged weights, whatever they become."""
    ddim_steps = int(cfg["n_ddim_steps"]) if cfg["use_ddim_sample"] else None
    return DiffusionActor(algorithm.acting(ddim_steps=ddim_steps), bool(cfg["fast"]))


def evaluate_policy(
    decode: Callable[[np.ndarray], np.ndarray],
    venv: AgentHistoryEnv,
    cfg: Mapping[str, Any],
    actor: DiffusionActor,
) -> AgentReturns:
    """`num_eval` episodes in groups of as many as there are environments, acting deterministically.

    Seeds and noise depend on `seed` alone: the same weights give the same returns, within training and after it.
    """
    noise, scale = NoiseSource(int(cfg["seed"])), np.float32(cfg["sample_noise_scale"])
    count, limit, found = int(cfg["num_eval"]), int(cfg["max_path_length"]), list[np.ndarray]()
    won: list[np.ndarray] = []
    while len(found) * venv.n_envs < count:
        first = EVALUATION_SEED + int(cfg["seed"]) + len(found) * venv.n_envs
        seen = venv.reset([{"seed": first + i} for i in range(venv.n_envs)])
        alive, totals = np.ones(venv.n_envs, bool), np.zeros((venv.n_envs, venv.n_agents))
        wins = np.zeros(venv.n_envs, bool)
        for _ in range(limit):
            draws = scale * actor.draw(noise, venv.n_envs)
            decision = actor.act(seen["state"], draws, deterministic=True)
            result = venv.step(decode(decision.actions)[:, : venv.act_steps])
            earned = result.infos.get("agent_rewards", np.repeat(result.rewards[:, None], venv.n_agents, axis=1))
            totals += np.where(alive[:, None], earned, 0)
            wins |= alive & result.infos.get("won", False)
            alive &= ~(result.terminated | result.truncated)
            seen = result.observations
            if not alive.any():
                break
        found.append(totals)
        won.append(wins if "won" in result.infos else np.full(venv.n_envs, np.nan))
    by_agent, wins = np.concatenate(found)[:count], np.concatenate(won)[:count]
    return AgentReturns(by_agent.mean(axis=1), by_agent, None if np.isnan(wins).any() else wins)


def result_path(folder: Path, step: int, cfg: Mapping[str, Any]) -> Path:
    """`results/step_<s>-ep_<n>[-ddim][-cg_<w>].json`"""
    name = f"step_{step}-ep_{cfg['num_eval']}" + ("-ddim" if cfg["use_ddim_sample"] else "")
    name += f"-cg_{cfg['condition_guidance_w']}" if cfg["returns_condition"] else ""
    return folder / "results" / f"{name}.json"


def write_result(folder: Path, step: int, found: AgentReturns, cfg: Mapping[str, Any]) -> Path:
    """Write it: means and deviations over episodes, by agent."""
    path = result_path(folder, step, cfg)
    facts: dict[str, Any] = {
        "average_ep_reward": found.by_agent.mean(axis=0).tolist(),
        "std_ep_reward": found.by_agent.std(axis=0).tolist(),
        "episodes": len(found.returns),
        "step": step,
    }
    if found.won is not None:
        facts["win_rate"] = float(found.won.mean())
    write_json(path, facts)
    return path
