"""The on-policy training loop: collect a rollout, hand it to the policy's trainer, watch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_rl.cluster import replicas
from diffusion_rl.config.compose import Config, merged, plain_copy
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.reward_scaling import RunningRewardScaler
from diffusion_rl.core.typing import Rng
from diffusion_rl.envs.interface import VectorEnv
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.methods.on_policy.ppo import PPOTrainer
from diffusion_rl.methods.on_policy.wide import CollectingPlan, WideCollector
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.evaluation import deciding, evaluate, make_venv
from diffusion_rl.training.fine_tuning import FineTuning, OnStep
from diffusion_rl.training.loop import restore_rng, rng_state
from diffusion_rl.training.policy_files import build_policy
from diffusion_rl.training.rollout import Rollout, collect


class OnPolicyTraining(FineTuning):
    """`ft_ppo_*` configurations; arguments as in `FineTuning`."""

    def __init__(self, cfg: Config, **parts: Any):
        super().__init__(cfg, **parts)
        self.KIND = self.model.KIND
        self.trainer: Any = self._make_trainer(reward_horizon(cfg))
        group = replicas.present()
        if group is not None:
            self.trainer = SharedUpdates(self.trainer, group, lambda: state_dict(self.model))
        widely = cfg["env"].get("collect") == "wide"
        self.wide = WideCollector(self.venv, self.trainer, self.seed) if widely else None
        self.scaler = RunningRewardScaler(self.n_envs) if self.train.get("reward_scale_running", False) else None

    def _build_policy(self) -> Any:
        policy = super()._build_policy()
        if getattr(policy, "use_ddim", False) and getattr(policy, "eta", ...) is None:
            raise UserError(
                "model.use_ddim=true explores with the noise of model.eta, which is not set: add "
                "model.eta._target_=diffusion_rl.networks.eta.EtaFixed model.eta.base_eta=1"
            )
        return policy

    def _make_venv(self) -> VectorEnv:
        if self.cfg["env"].get("collect") != "wide":
            return super()._make_venv()
        settings = plain_copy(self.cfg)
        return make_venv(self.cfg, self.model, self.seed, lambda plan: CollectingPlan.of(plan, settings))

    @staticmethod
    def replica(settings: Mapping[str, Any]) -> UpdatingReplica:
        """Builds what another process holds that updates with this one; settings: the whole configuration."""
        return UpdatingReplica(settings)

    def _make_trainer(self, horizon: int) -> PPOTrainer:
        if not hasattr(self.model, "make_trainer"):
            raise UserError(f"model._target_ is {type(self.model).__name__}, which is not trained on-policy")
        return self.model.make_trainer(self.train, horizon)

    @property
    def _train_actor(self) -> bool:
        """Says whether the actor is trained: not while the critic warms up."""
        return self.itr >= int(self.train["n_critic_warmup_itr"])

    def _end_iteration(self) -> dict[str, Any]:
        self.trainer.end_iteration(self._train_actor)
        row = {f"{n}_lr": lr for n, lr in self.trainer.learning_rates.items()}
        return row | self.trainer.watched()

    # ---------- collecting ----------

    def _collect(self, on_step: OnStep) -> Rollout:
        observations, firsts = self._start(self._options())
        self.env_steps += self.n_steps * self.n_envs * self.act_steps
        if self.wide is not None:
            rollout = self.wide.collect(self.itr, state_dict(self.model), self.n_steps, observations, firsts)
            on_step(self.n_steps - 1, rollout.rewards[-1])
            return rollout
        decide = deciding(self.trainer.actor, self.rng, deterministic=False)
        return collect(self.venv, decide, self.n_steps, observations, firsts, self.act_steps, on_step)

    def _evaluate(self, on_step: OnStep) -> Rollout:
        rng, options = self._evaluation_setting()
        decide = deciding(self.trainer.actor, rng, deterministic=True)
        return evaluate(decide, self.venv, self.n_steps, options, on_step)

    # ---------- updating ----------

    def _update(self, rollout: Rollout) -> dict[str, Any]:
        if self.scaler is not None:
            rollout.rewards = self.scaler(reward=rollout.rewards.T, first=rollout.firsts[:-1].T).T

        def check(losses: Mapping[str, float]) -> None:
            self.check_finite(losses, self.itr)

        return self.trainer.update(rollout, self.rng, self._train_actor, self.run_dir.stop_if_requested, check)

    # ---------- state ----------

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, metadata = super().state()
        metadata["train"]["reward_scaler"] = self.scaler.state() if self.scaler else None
        return tensors, metadata

    def _restore_training(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        self.trainer.before_weights(state["trainer"])
        super()._restore_training(checkpoint, state)
        if self.scaler and state["reward_scaler"]:
            self.scaler.restore(state["reward_scaler"])

    # ---------- watching ----------

    def _live(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"pg_loss": row.get("pg_loss"), "v_loss": row.get("v_loss"), "kl": row.get("approx_kl")}

    def _observed(self, rollout: Rollout, update: dict[str, Any]) -> dict[str, Any]:
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


def reward_horizon(settings: Mapping[str, Any]) -> int:
    """Returns how many actions of a chunk count in the loss of denoising steps."""
    return int(settings.get("reward_horizon", settings["act_steps"]))


class UpdatingReplica:
    """Policy and trainer of a process that updates with the driver, from the driver's rollouts."""

    def __init__(self, settings: Mapping[str, Any]):
        seed = int(settings["seed"])
        self.policy, self.rng = build_policy(merged(settings, {}), seed), NoiseSource(seed)
        self.trainer = self.policy.make_trainer(settings["train"], reward_horizon(settings))

    def update(self, rollout: Rollout, rng: Any, train_actor: bool) -> None:
        """Trains on a rollout, with draws from the driver's source as it was."""
        restore_rng(self.rng, rng)
        self.trainer.update(rollout, self.rng, train_actor)

    def end_iteration(self, train_actor: bool) -> None:
        """Advances the schedules."""
        self.trainer.end_iteration(train_actor)

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the policy's weights by name."""
        return state_dict(self.policy)

    def load(
        self, weights: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]
    ) -> None:
        """Goes on from a checkpoint."""
        self.trainer.before_weights(state)
        load_state_dict(self.policy, weights)
        self.trainer.restore(tensors, state)


class SharedUpdates(replicas.InStep):
    """The trainer of a policy, whose minibatches are shared with other processes.

    All of them stop at the same minibatch: a signal is heard between updates.
    """

    def update(
        self, rollout: Rollout, rng: Rng, train_actor: bool, stop: Any = None, check: Any = lambda losses: None
    ) -> dict[str, Any]:
        """Trains on a rollout, as `PPOTrainer.update` does."""
        sent = rollout, rng_state(rng), train_actor
        return self.together("update", *sent, ours=lambda: self._trainer.update(rollout, rng, train_actor, check=check))

    def end_iteration(self, train_actor: bool) -> None:
        """Advances the schedules everywhere, and looks whether the weights are still the same."""
        self.together("end_iteration", train_actor, ours=lambda: self._trainer.end_iteration(train_actor))
        self.require_equal()

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Takes back what a checkpoint says, everywhere; the driver's weights were loaded before."""
        self._trainer.restore(tensors, state)
        self.together("load", self.weights(), dict(tensors), dict(state), ours=lambda: None)
