"""The on-policy training loop: collect, estimate advantages, update; evaluate every so often.

Two quirks of the reference are kept because its results rest on them: only termination (not truncation) cuts the
bootstrap, and a training iteration after an evaluation goes on from the evaluation's last observations.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from omegaconf import DictConfig

from diffusion_rl.algorithms.dppo_trainer import LOSS_NAMES, DPPOTrainer
from diffusion_rl.core.config import instantiate
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.core.returns import gae
from diffusion_rl.core.reward_scaling import RunningRewardScaler
from diffusion_rl.envs.make import make_vector_env
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.loops.evaluation import evaluate, seeded_options
from diffusion_rl.loops.policy_files import fitting, load_policy, normalization_facts, open_checkpoint, policy_facts
from diffusion_rl.loops.rollout import EpisodeStatistics, Observations, Rollout, collect, episode_statistics
from diffusion_rl.loops.run_folder import RunFolder
from diffusion_rl.loops.run_state import Checkpoint
from diffusion_rl.reports.progress import Progress

log = logging.getLogger(__name__)

KIND = "dppo"  # of its checkpoints
Observer = Callable[[dict[str, Any]], None]


class OnPolicyTraining:
    """`ft_ppo_*` configurations.

    Args:
        cfg: the configuration (keys as in the reference).
        model, venv, noise: given objects instead of those the configuration describes.
        observer: called once per iteration with everything computed in it; slower, for tests.
    """

    def __init__(
        self,
        cfg: DictConfig,
        model: Any = None,
        venv: Any = None,
        noise: Any = None,
        observer: Observer | None = None,
    ):
        self.cfg, self.train, self.observer = cfg, cfg["train"], observer
        self.seed = int(cfg.get("seed", 42))
        self.model = model if model is not None else self._build_model()
        self.n_envs = int(cfg["env"]["n_envs"])
        self.venv = venv if venv is not None else self._build_venv()
        self.own_noise = noise is None
        self.noise = NoiseSource(self.seed) if noise is None else noise
        self.act_steps, self.n_steps = int(cfg["act_steps"]), int(self.train["n_steps"])
        reward_horizon = int(cfg.get("reward_horizon", self.act_steps))
        self.trainer = DPPOTrainer(self.model, self.train, reward_horizon)
        self.scaler = RunningRewardScaler(self.n_envs) if self.train.get("reward_scale_running", False) else None
        self.itr, self.env_steps = 0, 0
        self.observations: dict[str, np.ndarray] | None = None
        self.done = np.zeros(self.n_envs)
        self.began_anew = False  # resumed, but without the simulators' state

    def _build_model(self) -> Any:
        with initial_weights(NoiseSource(self.seed)):
            model = instantiate(self.cfg["model"])
        path = self.cfg["model"].get("network_path")
        if path:
            load_policy(model, open_checkpoint(path), path)
        return model

    def _build_venv(self) -> Any:
        cfg = self.cfg
        return make_vector_env(
            cfg["env"],
            obs_dim=cfg["obs_dim"],
            action_dim=cfg["action_dim"],
            act_steps=cfg["act_steps"],
            seed=self.seed,
        )

    # ---------- the loop ----------

    def run(self) -> list[dict[str, Any]]:
        """Train to the end (or to a signal); returns the rows of the metrics."""
        train, n_itr = self.train, int(self.train["n_train_itr"])
        folder = RunFolder(self.cfg, "itr", KIND)
        with contextlib.closing(self.venv):
            if folder.resumed is not None:
                self._restore(folder.resumed, folder.resumed_from)
            with folder, Progress(n_itr * self.n_steps, "fine-tuning", start=self.itr * self.n_steps) as progress:
                began = time.monotonic()
                while self.itr < n_itr:
                    row = self._iteration(folder, progress)
                    row["seconds"], began = time.monotonic() - began, time.monotonic()
                    folder.metrics.write(row)
                    self._report(progress, row)
                    keep = self.itr % int(train["save_model_freq"]) == 0 or self.itr == n_itr - 1
                    folder.remember(self.itr, *self._snapshot(), keep=keep)
                    self.itr += 1
                    folder.stop_if_requested()
            return folder.metrics.rows

    def _iteration(self, folder: RunFolder, progress: Progress) -> dict[str, Any]:
        train = self.train
        evaluating = self.itr % int(train["val_freq"]) == 0 and not train.get("force_train", False)

        def on_step(step: int, rewards: np.ndarray) -> None:
            progress.update(1)
            folder.stop_if_requested()

        rollout = self._evaluate(folder, on_step) if evaluating else self._collect(folder, on_step)
        self.observations, self.done = rollout.last_observations, rollout.firsts[-1]
        threshold = self.cfg["env"].get("best_reward_threshold_for_success", 0)
        stats = episode_statistics(rollout.rewards, rollout.firsts, self.act_steps, threshold)
        row = {
            "itr": self.itr,
            "kind": "eval" if evaluating else "train",
            "env_steps": self.env_steps,
            "episodes": stats.n_episodes,
            "episode_return": stats.mean_return if stats.n_episodes else None,
            "best_reward": stats.mean_best_reward if stats.n_episodes else None,
            "success_rate": stats.success_rate if stats.n_episodes else None,
        }
        if self.began_anew:
            row["resumed_without_simulator_state"] = True
            self.began_anew = False
        update: dict[str, Any] = {}
        train_actor = self.itr >= int(train["n_critic_warmup_itr"])
        if not evaluating:
            update = self._update(rollout, train_actor, folder)
            row |= {k: v for k, v in update.items() if np.isscalar(v)}
        self.trainer.end_iteration(train_actor)
        row |= {f"{n}_lr": lr for n, lr in self.trainer.learning_rates.items()}
        row["min_sampling_std"] = self.model.min_sampling_denoising_std
        if self.observer is not None:
            self._observe(rollout, stats, update, evaluating)
        return row

    # ---------- collecting ----------

    def _start(self, options: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        if self.observations is None or self.cfg["env"].get("reset_at_iteration", True):
            return self.venv.reset(options), np.ones(self.n_envs)
        return self.observations, self.done

    def _collect(self, folder: RunFolder, on_step: Callable[[int, np.ndarray], None]) -> Rollout:
        observations, firsts = self._start(self._options(folder))

        def decide(obs: Observations) -> tuple[np.ndarray, dict[str, np.ndarray]]:
            draws = self.noise.normal(self.trainer.actor.noise_shape(self.n_envs), floatx())
            decision = self.trainer.act(obs["state"], draws, deterministic=False)
            return decision.actions, {"chains": decision.chains, "log_probs": decision.log_probs}

        self.env_steps += self.n_steps * self.n_envs * self.act_steps
        return collect(self.venv, decide, self.n_steps, observations, firsts, self.act_steps, on_step)

    def _evaluate(self, folder: RunFolder, on_step: Callable[[int, np.ndarray], None]) -> Rollout:
        options = self._options(folder)
        if not self.own_noise:
            return evaluate(self.trainer.actor, self.venv, self.noise, self.n_steps, options, on_step)
        # Always the same episodes, drawn apart from the training's: what is saved can be evaluated again exactly.
        for option, seeded in zip(options, seeded_options(self.seed, self.n_envs), strict=True):
            option |= seeded
        return evaluate(self.trainer.actor, self.venv, NoiseSource(self.seed), self.n_steps, options, on_step)

    def _options(self, folder: RunFolder) -> list[dict[str, Any]]:
        options: list[dict[str, Any]] = [{} for _ in range(self.n_envs)]
        render = self.train.get("render", {})
        if self.cfg["env"].get("save_video", False) and self.itr % int(render.get("freq", 1)) == 0:
            for i in range(int(render.get("num", 0))):
                options[i]["video_path"] = str(folder.path / "render" / f"itr-{self.itr}_trial-{i}.mp4")
        return options

    # ---------- updating ----------

    def _update(self, rollout: Rollout, train_actor: bool, folder: RunFolder) -> dict[str, Any]:
        train, trainer = self.train, self.trainer
        s, e = rollout.rewards.shape
        state = rollout.observations["state"].astype(floatx()).reshape(s * e, *rollout.observations["state"].shape[2:])
        chains = rollout.decisions["chains"].reshape(s * e, *rollout.decisions["chains"].shape[2:])
        values = trainer.values(state).reshape(s, e)
        log_probs = rollout.decisions["log_probs"].reshape(s * e, *rollout.decisions["log_probs"].shape[2:])
        if self.scaler is not None:
            rollout.rewards = self.scaler(reward=rollout.rewards.T, first=rollout.firsts[:-1].T).T
        advantages, returns = gae(
            rollout.rewards,
            values,
            trainer.values(rollout.last_observations["state"].astype(floatx())),
            rollout.terminated,
            float(train["gamma"]),
            float(train.get("gae_lambda", 0.95)),
            float(train.get("reward_scale_const", 1)),
        )
        flat = [x.reshape(-1).astype(floatx()) for x in (returns, values, advantages)]
        n_rows = trainer.load(state, chains, *flat, log_probs)
        losses = self._minibatches(n_rows, train_actor, folder)
        y_pred, y_true = values.reshape(-1).astype(floatx()), returns.reshape(-1).astype(floatx())
        variance = np.var(y_true)
        summary: dict[str, Any] = {n: losses[n][-1] for n in LOSS_NAMES if losses[n]}
        summary["clipfrac"] = float(np.mean(losses["clipfrac"])) if losses["clipfrac"] else None
        summary["explained_variance"] = math.nan if variance == 0 else float(1 - np.var(y_true - y_pred) / variance)
        summary["updates"] = len(losses["pg_loss"])
        details = {"losses": losses, "values": values, "advantages": advantages, "returns": returns}
        return summary | details | {"log_probs": log_probs}

    def _minibatches(self, n_rows: int, train_actor: bool, folder: RunFolder) -> dict[str, list[float]]:
        train = self.train
        batch_size, target_kl = int(train["batch_size"]), train.get("target_kl", None)
        losses: dict[str, list[float]] = {n: [] for n in LOSS_NAMES}
        for _ in range(int(train["update_epochs"]) if n_rows else 0):
            permutation = self.noise.permutation(n_rows)
            for number in range(max(1, n_rows // batch_size)):  # what is left over is dropped
                rows = permutation[number * batch_size : (number + 1) * batch_size]
                folder.stop_if_requested()
                bc_noise = None
                if self.trainer.use_bc_loss:
                    bc_noise = self.noise.normal(self.trainer.actor.noise_shape(len(rows)), floatx())
                values = self.trainer.minibatch(rows, train_actor, number, bc_noise)
                self._check_finite(values, folder)
                for name, value in values.items():
                    losses[name].append(value)
                if target_kl is not None and values["approx_kl"] > target_kl:
                    return losses
        return losses

    def _check_finite(self, losses: dict[str, float], folder: RunFolder) -> None:
        bad = [n for n, v in losses.items() if not math.isfinite(v)]
        if bad:
            raise UserError(
                f"{bad[0]} is {losses[bad[0]]} in iteration {self.itr}: lower train.actor_lr or train.critic_lr, or "
                f"set train.max_grad_norm; {folder.last_good()}"
            )

    # ---------- state ----------

    def _snapshot(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything a run needs to go on bit for bit, as tensors and JSON metadata."""
        tensors = {f"model.{k}": v for k, v in state_dict(self.model).items()}
        tensors |= self.trainer.tensors()
        tensors["train.done"] = np.asarray(self.done)
        for key, value in (self.observations or {}).items():
            tensors[f"train.observations.{key}"] = np.asarray(value)
        restorable = bool(getattr(self.venv, "restorable", False))
        if restorable:
            tensors |= {f"train.env.{k}": np.asarray(v) for k, v in self.venv.get_state().items()}
        wrappers = self.cfg["env"].get("wrappers", None) or {}
        paths = [w.get("normalization_path") for w in wrappers.values() if w and w.get("normalization_path")]
        metadata = {
            "kind": KIND,
            **policy_facts(self.model),
            "normalization": normalization_facts(paths[0] if paths else None),
            "train": {
                "env_steps": self.env_steps,
                "env_restorable": restorable,
                "noise": self.noise.state() if hasattr(self.noise, "state") else None,
                "reward_scaler": self.scaler.state() if self.scaler else None,
                "trainer": self.trainer.state(),
            },
        }
        return tensors, metadata

    def _restore(self, checkpoint: Checkpoint, path: Any) -> None:
        with fitting(path):
            state = checkpoint.metadata["train"]
            if not state["trainer"]["actor_is_network"]:
                self.model.separate_actor()
            load_state_dict(self.model, checkpoint.select("model."))
            self.trainer.restore(checkpoint.tensors, state["trainer"])
            self.noise.restore(state["noise"])
            if self.scaler and state["reward_scaler"]:
                self.scaler.restore(state["reward_scaler"])
            self.itr, self.env_steps = int(checkpoint.metadata["itr"]) + 1, int(state["env_steps"])
            if state["env_restorable"] and getattr(self.venv, "restorable", False):
                self.venv.set_state(checkpoint.select("train.env."))
                self.observations = checkpoint.select("train.observations.")
                self.done = checkpoint.tensors["train.done"]
            else:
                self.began_anew = True
                log.warning("these environments cannot be restored: the resumed run begins with new episodes")

    # ---------- watching ----------

    def _report(self, progress: Progress, row: dict[str, Any]) -> None:
        live = {"itr": row["itr"], f"{row['kind']}_return": row["episode_return"]}
        if row["kind"] == "train":
            live |= {"pg_loss": row.get("pg_loss"), "v_loss": row.get("v_loss"), "kl": row.get("approx_kl")}
        progress.update(0, **{k: v for k, v in live.items() if v is not None})

    def _observe(self, rollout: Rollout, stats: EpisodeStatistics, update: dict, evaluating: bool) -> None:
        seen = {
            "itr": self.itr,
            "eval_mode": evaluating,
            "reward_trajs": rollout.rewards,
            "terminated_trajs": rollout.terminated,
            "firsts_trajs": rollout.firsts,
            "chains_trajs": rollout.decisions["chains"],
            "obs_trajs": rollout.observations["state"],
            "avg_episode_reward": stats.mean_return,
            "avg_best_reward": stats.mean_best_reward,
            "success_rate": stats.success_rate,
            "num_episode_finished": stats.n_episodes,
            "lr": {f"{n}_optimizer": lr for n, lr in self.trainer.learning_rates.items()},
        }
        if update:
            seen |= {
                "values_trajs": update["values"],
                "logprobs_trajs": update["log_probs"],
                "advantages_trajs": update["advantages"],
                "returns_trajs": update["returns"],
                "explained_var": update["explained_variance"],
                "clipfracs": np.array(update["losses"]["clipfrac"]),
                "losses": {n: np.array(v) for n, v in update["losses"].items()},
            }
        self.observer(seen)
