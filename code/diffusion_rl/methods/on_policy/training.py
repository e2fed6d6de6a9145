"""The on-policy training loop: collect, estimate advantages, update.

A quirk of the reference is kept because its results rest on it: only termination (not truncation) cuts the bootstrap.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_rl.config.compose import Config
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx
from diffusion_rl.core.returns import gae
from diffusion_rl.core.reward_scaling import RunningRewardScaler
from diffusion_rl.methods.on_policy.trainers import on_policy_trainer
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.evaluation import evaluate
from diffusion_rl.training.fine_tuning import FineTuning, Observer, OnStep
from diffusion_rl.training.rollout import Observations, Rollout, collect
from diffusion_rl.training.run_dir import RunFolder


class OnPolicyTraining(FineTuning):
    """`ft_ppo_*` configurations; arguments as in `FineTuning`."""

    def __init__(
        self,
        cfg: Config,
        model: Any = None,
        venv: Any = None,
        noise: Any = None,
        observer: Observer | None = None,
    ):
        super().__init__(cfg, model, venv, noise, observer)
        reward_horizon = int(cfg.get("reward_horizon", self.act_steps))
        self.KIND = self.model.KIND
        self.trainer = on_policy_trainer(self.model, self.train, reward_horizon)
        self.scaler = RunningRewardScaler(self.n_envs) if self.train.get("reward_scale_running", False) else None

    def _build_model(self) -> Any:
        model = super()._build_model()
        if getattr(model, "use_ddim", False) and getattr(model, "eta", ...) is None:
            raise UserError(
                "model.use_ddim=true explores with the noise of model.eta, which is not set: add "
                "model.eta._target_=diffusion_rl.networks.eta.EtaFixed model.eta.base_eta=1"
            )
        return model

    @property
    def _train_actor(self) -> bool:
        """False while the critic warms up."""
        return self.itr >= int(self.train["n_critic_warmup_itr"])

    def _end_iteration(self) -> dict[str, Any]:
        self.trainer.end_iteration(self._train_actor)
        row = {f"{n}_lr": lr for n, lr in self.trainer.learning_rates.items()}
        return row | self.trainer.watched()

    # ---------- collecting ----------

    def _collect(self, folder: RunFolder, on_step: OnStep) -> Rollout:
        observations, firsts = self._start(self._options(folder))

        def decide(obs: Observations) -> tuple[np.ndarray, dict[str, np.ndarray]]:
            draws = self.trainer.actor.draw(self.noise, self.n_envs)
            decision = self.trainer.act(obs["state"], draws, deterministic=False, rgb=obs.get("rgb"))
            return decision.actions, decision.arrays()

        self.env_steps += self.n_steps * self.n_envs * self.act_steps
        return collect(self.venv, decide, self.n_steps, observations, firsts, self.act_steps, on_step)

    def _evaluate(self, folder: RunFolder, on_step: OnStep) -> Rollout:
        noise, options = self._evaluation_setting(folder)
        return evaluate(self.trainer.actor, self.venv, noise, self.n_steps, options, on_step)

    # ---------- updating ----------

    def _update(self, rollout: Rollout, folder: RunFolder) -> dict[str, Any]:
        train, trainer = self.train, self.trainer
        s, e = rollout.rewards.shape
        obs = {k: v.reshape(s * e, *v.shape[2:]) for k, v in rollout.observations.items()}
        state, rgb = obs["state"].astype(floatx()), obs.get("rgb")
        if rgb is not None:
            rgb = trainer.shifted(rgb, self.noise)
        decisions = {k: v.reshape(s * e, *v.shape[2:]) for k, v in rollout.decisions.items()}
        values = trainer.values(state, rgb).reshape(s, e)
        log_probs = trainer.old_log_probs(state, decisions, self.noise, rgb)
        if self.scaler is not None:
            rollout.rewards = self.scaler(reward=rollout.rewards.T, first=rollout.firsts[:-1].T).T
        last = rollout.last_observations
        advantages, returns = gae(
            rollout.rewards,
            values,
            trainer.values(last["state"].astype(floatx()), last.get("rgb")),
            rollout.terminated,
            float(train["gamma"]),
            float(train.get("gae_lambda", 0.95)),
            float(train.get("reward_scale_const", 1)),
        )
        flat = [x.reshape(-1).astype(floatx()) for x in (returns, values, advantages)]
        n_rows = trainer.load(state, decisions[trainer.SAMPLES], *flat, log_probs, rgb=rgb)
        losses = self._minibatches(n_rows, self._train_actor, folder)
        y_pred, y_true = values.reshape(-1).astype(floatx()), returns.reshape(-1).astype(floatx())
        variance = np.var(y_true)
        summary: dict[str, Any] = {n: losses[n][-1] for n in losses}
        summary["clipfrac"] = float(np.mean(losses["clipfrac"])) if losses else None
        summary["explained_variance"] = math.nan if variance == 0 else float(1 - np.var(y_true - y_pred) / variance)
        summary["updates"] = len(losses["pg_loss"])
        details = {"losses": losses, "values": values, "advantages": advantages, "returns": returns}
        return summary | details | {"log_probs": log_probs}

    def _minibatches(self, n_rows: int, train_actor: bool, folder: RunFolder) -> dict[str, list[float]]:
        train = self.train
        batch_size, target_kl = int(train["batch_size"]), train.get("target_kl", None)
        losses: dict[str, list[float]] = defaultdict(list)
        for _ in range(int(train["update_epochs"]) if n_rows else 0):
            permutation = self.noise.permutation(n_rows)
            for number in range(max(1, n_rows // batch_size)):  # what is left over is dropped
                rows = permutation[number * batch_size : (number + 1) * batch_size]
                folder.stop_if_requested()
                draws = self.trainer.draw(self.noise, len(rows))
                values = self.trainer.minibatch(rows, train_actor, number, draws)
                self._check_finite(values, folder)
                for name, value in values.items():
                    losses[name].append(value)
                if target_kl is not None and values["approx_kl"] > target_kl and self._may_stop(number, train_actor):
                    return losses
        return losses

    def _may_stop(self, number: int, train_actor: bool) -> bool:
        """Where gradients are accumulated, only after a step of the actor."""
        return self.trainer.grad_accumulate == 1 or (train_actor and self.trainer.complete(number))

    # ---------- state ----------

    def _snapshot(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, metadata = super()._snapshot()
        metadata["train"]["reward_scaler"] = self.scaler.state() if self.scaler else None
        return tensors, metadata

    def _restore_training(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        self.trainer.before_weights(state["trainer"])
        super()._restore_training(checkpoint, state)
        if self.scaler and state["reward_scaler"]:
            self.scaler.restore(state["reward_scaler"])

    # ---------- watching ----------

    def _live(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"pg_loss": row.get("pg_loss"), "v_loss": row.get("v_loss"), "kl": row.get("approx_kl")}

    def _seen(self, rollout: Rollout, update: dict[str, Any]) -> dict[str, Any]:
        seen: dict[str, Any] = {"samples_trajs": rollout.decisions["actions"]}
        if "chains" in rollout.decisions:
            seen["chains_trajs"] = rollout.decisions["chains"]
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
        return seen
