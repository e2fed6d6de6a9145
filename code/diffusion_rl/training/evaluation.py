"""Evaluation: the one way a policy's return is measured, within training and alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.config.compose import Config, merged, plain_copy
from diffusion_rl.config.instantiate import instantiate
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.typing import Rng
from diffusion_rl.envs.interface import Observations, VectorEnv
from diffusion_rl.envs.make import EnvPlan, make_vector_env, plan_vector_env
from diffusion_rl.networks.vision import check_images
from diffusion_rl.policies import flow
from diffusion_rl.policies.acting import actor_for
from diffusion_rl.policies.diffusion import FineTunedDiffusionPolicy
from diffusion_rl.reports.metrics import MetricsWriter
from diffusion_rl.reports.progress import Progress
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.episodes import seeded_options
from diffusion_rl.training.policy_files import (
    GAUSSIAN_SAMPLING,
    SAMPLING,
    Policy,
    is_fine_tuned,
    load_policy,
    open_checkpoint,
    policy_weights,
)
from diffusion_rl.training.rollout import (
    Decide,
    EpisodeStatistics,
    Rollout,
    collect,
    episode_statistics,
    knows_success,
    no_episode_ended,
    success_threshold,
)
from diffusion_rl.training.run_dir import write_config
from diffusion_rl.training.run_facts import compare_policy

log = logging.getLogger(__name__)


def evaluate(
    decide: Decide,
    venv: Any,
    n_steps: int,
    options: list[dict[str, Any]],
    on_step: Callable[[int, np.ndarray], None] = lambda step, rewards: None,
    n_episodes: int | None = None,
) -> Rollout:
    """Resets all environments and acts for `n_steps` chunks, or until `n_episodes` have ended if that is sooner.

    Args:
        options: per environment; a `seed` in each makes the result a function of the weights and the seeds alone.
    """
    observations, firsts = venv.reset(options), np.ones(venv.n_envs)
    return collect(venv, decide, n_steps, observations, firsts, venv.act_steps, on_step, n_episodes=n_episodes)


def deciding(actor: Any, rng: Rng, deterministic: bool) -> Decide:
    """Returns what lets an actor (`policies.acting`) decide, with draws from `rng`."""

    def decide(obs: Observations) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        draws = actor.draw(rng, len(obs["state"]))
        decision = actor.act(obs["state"], draws, deterministic=deterministic, rgb=obs.get("rgb"))
        return decision.actions, decision.arrays()

    return decide


def make_venv(cfg: Config, policy: Any, seed: int, shared: Callable[[EnvPlan], EnvPlan] | None = None) -> VectorEnv:
    """Makes the environments of a run. Raises UserError also where they show other images than `policy` sees.

    Args:
        shared: what actors of a cluster build instead.
    """
    dims = {name: cfg[name] for name in ("obs_dim", "action_dim", "act_steps")}
    venv = _made(cfg, dims, seed, shared)
    try:
        check_images(getattr(policy, "network", None), venv.obs_spec.get("rgb"), f"environment {cfg['env']['name']}")
    except UserError:
        venv.close()
        raise
    return venv


def _made(cfg: Config, dims: dict[str, int], seed: int, shared: Callable[[EnvPlan], EnvPlan] | None) -> VectorEnv:
    """Makes environments on this machine, or in a cluster where `env.cluster` says so, there of `shared(plan)`."""
    env = cfg["env"]
    if env.get("cluster") is None:
        named = [key for key in ("actors", "nodes", "spares") if env.get(key)]
        named += ["collect"] if env.get("collect") == "wide" else []
        if named:
            raise UserError(f"env.{named[0]}={env[named[0]]} does nothing without a cluster: add env.cluster=ray")
        return make_vector_env(cfg["env"], **dims, seed=seed)
    if env.get("collect") == "wide" and shared is None:
        raise UserError("env.collect=wide is for on-policy fine-tuning: leave it out")
    from diffusion_rl.cluster.remote import RemoteVectorEnv  # needs the extra `cluster`
    from diffusion_rl.cluster.session import ClusterSettings

    plan = plan_vector_env(cfg["env"], **dims, seed=seed)
    return RemoteVectorEnv(plan if shared is None else shared(plan), ClusterSettings.of(cfg))


class Evaluation:
    """`eval_*` configurations: load a checkpoint, run it, report.

    The checkpoint says what it is: a pre-trained policy, or a fine-tuned one with its number of fine-tuned steps.
    `ft_denoising_steps` is needed for the reference's own fine-tuned `.pt` files only, which do not record it.
    """

    def __init__(self, cfg: Config):
        self.cfg = cfg
        path = cfg["base_policy_path"] if "base_policy_path" in cfg else cfg["model"]["network_path"]
        checkpoint = open_checkpoint(path)
        compare_policy(checkpoint, cfg, path, evaluating=True)
        self.policy: Policy = instantiate(model_of(checkpoint, cfg["model"]))
        asked = int(cfg.get("ft_denoising_steps", 0) or 0)
        if isinstance(self.policy, FineTunedDiffusionPolicy):
            self.policy.ft_denoising_steps = fine_tuned_steps(checkpoint, asked, path)
        elif asked:
            log.warning("%s has no denoising steps: ft_denoising_steps=%d changes nothing", path, asked)
        load_policy(self.policy, checkpoint, path)
        # Decide by the same program as the training did: the other one rounds differently.
        self.fast = bool(((checkpoint.metadata.get("config") or {}).get("train") or {}).get("fast", True))
        self.seed = int(cfg.get("seed", 42))
        self.venv = make_venv(cfg, self.policy, self.seed)

    def run(self) -> EpisodeStatistics:
        """Evaluates, prints, and writes `result.npz` and metrics into the log folder."""
        cfg, began = self.cfg, time.monotonic()
        n_envs, n_steps = self.venv.n_envs, int(cfg["n_steps"])
        options = seeded_options(self.seed, n_envs)
        logdir = Path(cfg["logdir"])
        if cfg["env"].get("save_video", False):
            for i in range(min(int(cfg.get("render_num", 0)), n_envs)):
                options[i]["video_path"] = str(logdir / "render" / f"eval_trial-{i}.mp4")
        with Progress(n_steps, "evaluating") as progress:
            actor = actor_for(self.policy, self.fast)  # type: ignore[arg-type]  # built to be fine-tuned
            decide = deciding(actor, NoiseSource(self.seed), deterministic=True)
            rollout = evaluate(decide, self.venv, n_steps, options, lambda step, rewards: progress.update(1))
        self.venv.close()
        threshold = success_threshold(cfg["env"], rollout.successes is not None)
        stats = episode_statistics(rollout, cfg["act_steps"], threshold)
        if stats.n_episodes:
            has_success = rollout.successes is not None or knows_success(str(cfg.get("env_name")))
            success = f"success rate {stats.success_rate:.4f} | " if has_success else ""
            print(
                f"eval: {stats.n_episodes} episodes | {success}"
                f"avg episode reward {stats.mean_return:.4f} | avg best reward {stats.mean_best_reward:.4f}"
            )
        else:
            print(f"eval: {no_episode_ended(n_steps, cfg['act_steps'], 'n_steps')}")
        self._write(logdir, stats, time.monotonic() - began)
        return stats

    def _write(self, logdir: Path, stats: EpisodeStatistics, seconds: float) -> None:
        write_config(logdir, plain_copy(self.cfg))
        with atomic_file(logdir / "result.npz") as file:
            np.savez(
                file,
                num_episode=stats.n_episodes,
                eval_success_rate=_or_nan(stats, stats.success_rate),
                eval_episode_reward=_or_nan(stats, stats.mean_return),
                eval_best_reward=_or_nan(stats, stats.mean_best_reward),
                returns=stats.returns,
                time=seconds,
            )
        with MetricsWriter(logdir, tensorboard=False) as metrics:
            metrics.write(
                {
                    "itr": 0,
                    "kind": "eval",
                    "episodes": stats.n_episodes,
                    **stats.measured(),
                    "seconds": seconds,
                }
            )


def _or_nan(stats: EpisodeStatistics, value: float) -> float:
    return value if stats.n_episodes else float("nan")


def model_of(checkpoint: Checkpoint, model: Config) -> Config:
    """Returns the `model` node with the sampling settings that a fine-tuned checkpoint of ours was trained with.

    They belong to the policy as its weights do: with others, the evaluation would not be that of the training.
    """
    sampling = checkpoint.metadata.get("sampling") if is_fine_tuned(policy_weights(checkpoint)) else None
    if not sampling:
        return model
    model = merged(model, {})
    sampling = {k: v for k, v in sampling.items() if k in (*SAMPLING, *GAUSSIAN_SAMPLING, *flow.SAMPLING)}
    different = {k: v for k, v in sampling.items() if k in model and model[k] != v}
    if different:
        log.info("from the checkpoint: %s", ", ".join(f"model.{k}={v}" for k, v in different.items()))
    return merged(model, sampling)


def fine_tuned_steps(checkpoint: Any, asked: int, path: Any) -> int:
    """Returns how many denoising steps are fine-tuned; `asked`: the configuration's number (0: it has none)."""
    if not is_fine_tuned(policy_weights(checkpoint)):
        if asked:
            log.warning("%s is a pre-trained policy: ft_denoising_steps=%d changes nothing", path, asked)
        return asked
    known = checkpoint.metadata.get("ft_denoising_steps")
    if known is not None:
        if asked and asked != known:
            raise UserError(f"{path} was fine-tuned with ft_denoising_steps={known}, not {asked}: leave it out")
        return int(known)
    if not asked:
        raise UserError(f"{path} is fine-tuned but does not say how many steps: add ft_denoising_steps=<its number>")
    return asked
