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
from diffusion_rl.envs.interface import Observations
from diffusion_rl.methods.vae_latent.history import AgentHistoryEnv
from diffusion_rl.methods.vae_latent.model import LatentDiffusionRL
from diffusion_rl.policies.acting import DiffusionActor
from diffusion_rl.training.episodes import Act, Step, run, seeded_options

EVALUATION_SEED = 10_000_019  # apart from those of training


@dataclass(frozen=True)
class AgentReturns:
    """Results of n episodes: returns [n] (means over agents), of each agent [n,N], and whether they were won [n]."""

    returns: np.ndarray
    by_agent: np.ndarray
    won: np.ndarray | None = None


def decoder(algorithm: LatentDiffusionRL) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a compiled function: latents [B,H,N*Z] -> actions or logits [B,H,N*A]."""
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
    """Plays `num_eval` episodes in groups of as many as there are environments, deterministically.

    Seeds and noise depend on `seed` alone: the same weights give the same returns, within training and after it.
    """
    rng, scale = NoiseSource(int(cfg["seed"])), np.float32(cfg["sample_noise_scale"])

    def act(step: int, observations: Observations) -> np.ndarray:
        decision = actor.act(observations["state"], scale * actor.draw(rng, venv.n_envs), deterministic=True)
        return decode(decision.actions)[:, : venv.act_steps]

    groups: list[tuple[np.ndarray, np.ndarray]] = []
    while len(groups) * venv.n_envs < int(cfg["num_eval"]):
        first = EVALUATION_SEED + int(cfg["seed"]) + len(groups) * venv.n_envs
        groups.append(_episodes(act, venv, first, int(cfg["max_path_length"])))
    by_agent, won = (np.concatenate(group)[: int(cfg["num_eval"])] for group in zip(*groups, strict=True))
    return AgentReturns(by_agent.mean(axis=1), by_agent, None if np.isnan(won).any() else won)


def _episodes(act: Act, venv: AgentHistoryEnv, seed: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Plays an episode in each environment; returns of the agents [E,N], and victories [E] (NaN: not known)."""
    totals, won = np.zeros((venv.n_envs, venv.n_agents)), np.full(venv.n_envs, np.nan)

    def on_step(step: Step) -> None:
        infos, rewards = step.result.infos, step.result.rewards
        earned = infos.get("agent_rewards", np.repeat(rewards[:, None], venv.n_agents, axis=1))
        totals[:] += np.where(step.alive[:, None], earned, 0)
        if "won" in infos:
            won[:] = (won == 1) | (step.alive & infos["won"])

    run(act, venv, venv.reset(seeded_options(seed, venv.n_envs)), limit, on_step)
    return totals, won


def result_path(folder: Path, step: int, cfg: Mapping[str, Any]) -> Path:
    """Returns `results/step_<s>-ep_<n>[-ddim][-cg_<w>].json`."""
    name = f"step_{step}-ep_{cfg['num_eval']}" + ("-ddim" if cfg["use_ddim_sample"] else "")
    name += f"-cg_{cfg['condition_guidance_w']}" if cfg["returns_condition"] else ""
    return folder / "results" / f"{name}.json"


def write_result(folder: Path, step: int, episodes: AgentReturns, cfg: Mapping[str, Any]) -> Path:
    """Writes means and deviations over episodes, by agent."""
    path = result_path(folder, step, cfg)
    facts: dict[str, Any] = {
        "average_ep_reward": episodes.by_agent.mean(axis=0).tolist(),
        "std_ep_reward": episodes.by_agent.std(axis=0).tolist(),
        "episodes": len(episodes.returns),
        "step": step,
    }
    if episodes.won is not None:
        facts["win_rate"] = float(episodes.won.mean())
    write_json(path, facts)
    return path
