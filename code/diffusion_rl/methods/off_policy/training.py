"""The off-policy training loop: collect into a buffer, then many updates on rows drawn from it.

It serves every algorithm of this folder. Each declares its differences with `Experience` and `Phase` of
`methods.off_policy.algorithm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_rl.config.compose import Config
from diffusion_rl.config.instantiate import instantiate
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx
from diffusion_rl.core.returns import rewards_to_go
from diffusion_rl.core.typing import Rng
from diffusion_rl.data.replay import ReplayBuffer, fields
from diffusion_rl.envs.interface import Observations
from diffusion_rl.methods.off_policy.algorithm import Experience, Progress
from diffusion_rl.methods.off_policy.buffers import Buffers, Rows
from diffusion_rl.methods.off_policy.learner import Learner, Losses
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.evaluation import evaluate
from diffusion_rl.training.fine_tuning import FineTuning, OnStep
from diffusion_rl.training.rollout import (
    Decide,
    EpisodeStatistics,
    Rollout,
    RunningEpisodes,
    collect,
    no_episode_ended,
    success_threshold,
)

MOST_STEPS = 100_000  # of a collection or evaluation that is counted in episodes
HELD_SECONDS = 5.0  # between two states held for a signal, where iterations are as short as one step


class OffPolicyTraining(FineTuning):
    """`ft_{rwr,awr,dipo,idql,dql,qsm,dacer,dsrl}_*`, `sac_*`, `rlpd_*`, `ibrl_*`, `calql_*`, `fql_*` and `qc_*`
    configurations.

    Args:
        dataset: a `QLearningDataset` instead of the one the configuration's `offline_dataset` describes.
        further arguments: as in `FineTuning`.
    """

    SHARED_OPERATIONS = True  # an update is one compiled program: threads share its products

    def __init__(self, cfg: Config, dataset: Any = None, **parts: Any):
        super().__init__(cfg, **parts)
        self.KIND = self.model.KIND
        self.experience: Experience = self.model.experience(self.train)
        self.buffers = Buffers(self._new_buffer())
        self._take_dataset(dataset)
        self.trainer = Learner(self.model, self.train, self.buffers)
        if self.experience.counts_episodes:  # an iteration may be as short as one step
            self.HELD_SECONDS = HELD_SECONDS
        self.iterations_trained, self.updates = 0, 0  # in this process
        self.episodes = RunningEpisodes(self.n_envs)
        self._decided = np.zeros(0)  # by the last decision, executed or not

    def _counts_rollouts(self) -> bool:
        return not self.experience.counts_episodes

    def finish(self) -> None:
        if self.experience.whole_episodes and self.iterations_trained and not self.updates:
            raise UserError(
                "nothing was trained: this algorithm learns from whole episodes, and "
                + no_episode_ended(self.n_steps, self.act_steps, "train.n_steps")
            )

    # ---------- buffers ----------

    def _shapes(self, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        cfg = self.cfg
        chunk = cfg["horizon_steps"] if self.experience.whole_episodes else self.act_steps
        return fields(names, (cfg["cond_steps"], cfg["obs_dim"]), (chunk, cfg["action_dim"]))

    def _new_buffer(self) -> ReplayBuffer:
        if self.experience.whole_episodes:
            capacity = self.n_steps * self.n_envs
        elif self.experience.n_episodes == 0:  # nothing will be collected
            capacity = 1
        else:
            capacity = int(self.train["buffer_size"]) * (self.n_envs if self.experience.counts_steps else 1)
        return ReplayBuffer(capacity, self._shapes(self.experience.fields))

    def _take_dataset(self, dataset: Any) -> None:
        """Puts the offline data into a buffer of its own, or at the beginning of the replay buffer."""
        names = self.experience.offline_fields
        if not names and not self.experience.starts_with_dataset:
            return
        dataset = instantiate(self.cfg["offline_dataset"]) if dataset is None else dataset
        items = dataset.gather(np.arange(len(dataset)))
        rows = {
            "obs": items.conditions["state"],
            "next_obs": items.conditions["next_state"],
            "actions": items.actions,
            "rewards": items.rewards[:, 0],
            "terminated": items.dones[:, 0],
        }
        if items.reward_to_gos is not None:
            rows["returns"] = items.reward_to_gos[:, 0]
        if names:
            self.buffers.offline = ReplayBuffer(len(dataset), self._shapes(names))
        buffer = self.buffers.offline or self.buffers.online
        buffer.add(**rows)
        buffer.flush()

    # ---------- collecting ----------

    def _evaluating(self) -> bool:
        if self.experience.counts_episodes:
            explored = self.itr - int(self.train["n_explore_steps"])
            if explored < 0 or (explored == 0 and not self.experience.evaluates_at_once):
                return False
        return super()._evaluating()

    def _collect(self, on_step: OnStep) -> Rollout:
        kept, n_steps = self.experience, self.n_steps
        if kept.n_episodes is not None:
            n_steps = MOST_STEPS if kept.n_episodes else 0
        observations, firsts = self._start(self._options())
        at_random = kept.explores and self.itr < int(self.train["n_explore_steps"])
        decide = self._at_random if at_random else self._decisions(self.rng, deterministic=False)
        rollout = collect(
            self.venv, decide, n_steps, observations, firsts, self.act_steps, on_step, self._store, kept.n_episodes
        )
        if kept.whole_episodes:
            self._keep_episodes(rollout)
        elif kept.n_episodes and "returns" in kept.fields:
            self._keep_returns(rollout)
        self.env_steps += rollout.rewards.size * self.act_steps
        return rollout

    def _evaluate(self, on_step: OnStep) -> Rollout:
        rng, options = self._evaluation_setting()
        n_steps, n_episodes = self.n_steps, None
        if self.experience.counts_episodes:
            n_steps, n_episodes = MOST_STEPS, int(self.train["n_eval_episode"])
        decide = self._decisions(rng, deterministic=True)
        return evaluate(decide, self.venv, n_steps, options, on_step, n_episodes)

    def _decisions(self, rng: Rng, deterministic: bool) -> Decide:
        def decide(obs: Observations) -> tuple[np.ndarray, dict[str, np.ndarray]]:
            actions = self.trainer.act(obs["state"], rng, deterministic)
            self._decided = actions
            return actions, {"actions": actions} if self.experience.whole_episodes else {}

        return decide

    def _at_random(self, obs: Observations) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        shape = (self.n_envs, self.act_steps, self.cfg["action_dim"])
        return self.rng.uniform(shape, -1.0, 1.0, floatx()), {}

    def _store(self, observations: Observations, actions: np.ndarray, result: Any) -> None:
        """Keeps transitions. A truncation is followed by the old episode's last observation, not a new one's first."""
        if self.experience.whole_episodes:
            return
        if self.experience.stores_rest:
            actions = self._decided[:, self.act_steps :]
        following, truncated = np.array(result.observations["state"]), np.asarray(result.truncated, bool)
        if truncated.any():
            following[truncated] = result.infos["final_observations"]["state"][truncated]
            if self.experience.acts_on_last:
                result.observations["state"] = following
        self.buffers.online.add(
            obs=observations["state"],
            actions=actions,
            next_obs=following,
            rewards=result.rewards * self.train["scale_reward_factor"],
            terminated=result.terminated,
        )

    def _keep_episodes(self, rollout: Rollout) -> None:
        """Keeps nothing but the complete episodes of this rollout, with discounted rewards-to-go."""
        self.buffers.online.clear()
        for env, start, end in rollout.episodes():
            self.buffers.online.add(
                obs=rollout.observations["state"][start:end, env],
                actions=rollout.decisions["actions"][start:end, env],
                returns=rewards_to_go(rollout.rewards[start:end, env], self.train["gamma"]),
            )

    def _keep_returns(self, rollout: Rollout) -> None:
        """Writes the discounted rewards-to-go of the episodes that were just added whole."""
        ends = np.flatnonzero(rollout.firsts[1:, 0]) + 1
        episodes = np.split(rollout.rewards[:, 0], ends[:-1])
        returns = np.concatenate([rewards_to_go(rewards, self.train["gamma"]) for rewards in episodes])
        self.buffers.online.write("returns", returns)

    # ---------- updating ----------

    def _update(self, rollout: Rollout) -> dict[str, Any]:
        self.buffers.online.flush()
        losses: Losses = {}
        summary: dict[str, Any] = {"updates": 0}
        lengths = [end - start for _, start, end in rollout.episodes()]
        progress = Progress(self.itr, rollout.rewards.size, self.buffers.online.size, lengths[0] if lengths else 0)
        rows = Rows(self.buffers, self.rng, self.n_envs)
        for phase in self.model.phases(self.train, progress):
            if phase.n <= 0:
                continue
            if phase.before is not None:
                summary |= getattr(self.model, phase.before)(self.buffers, self.train, self.n_envs)
            losses |= self.trainer.run(phase, self.rng, rows, lambda n, latest: self._after(latest))
            summary["updates"] += phase.n
        summary |= {name: float(values[-1]) for name, values in losses.items()}
        self.iterations_trained += 1
        self.updates += summary["updates"]
        return summary | self.model.watched() | {"losses": losses}

    def _after(self, losses: Losses) -> None:
        """Checks the losses and stops if that was asked for, between compiled calls."""
        self.check_finite({name: values[-1] for name, values in losses.items()}, self.itr)
        self.run_dir.stop_if_requested()

    def _end_iteration(self) -> dict[str, Any]:
        self.trainer.end_iteration()
        return {f"{n}_lr": lr for n, lr in self.trainer.learning_rates.items()}

    # ---------- state ----------

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, metadata = super().state()
        if not self.experience.whole_episodes:
            tensors |= {f"train.buffer.{name}": rows for name, rows in self.buffers.online.tensors().items()}
        tensors |= {f"train.episodes.{name}": value for name, value in self.episodes.state().items()}
        return tensors, metadata

    def _restore_training(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        super()._restore_training(checkpoint, state)
        if not self.experience.whole_episodes:
            self.buffers.online.restore(checkpoint.select("train.buffer."))
        self.episodes.restore(checkpoint.select("train.episodes."))

    # ---------- watching ----------

    def _reported(self, rollout: Rollout, evaluating: bool, stats: EpisodeStatistics) -> EpisodeStatistics:
        """Returns the training's episodes that ended since its last row, where iterations are single steps."""
        if not self.experience.counts_episodes or self.experience.n_episodes is not None:
            return stats
        if evaluating:
            self.episodes.interrupt()
            return stats
        self.episodes.add(rollout)
        threshold = success_threshold(self.cfg["env"], self.episodes.reached is not None)
        statistics = self.episodes.statistics(self.act_steps, threshold)
        if self._is_logged({"kind": "train"}):
            self.episodes.clear()
        return statistics

    def _is_logged(self, row: dict[str, Any]) -> bool:
        return row["kind"] == "eval" or self.itr % int(self.train.get("log_freq", 1)) == 0

    def _live(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name.startswith("loss_")}

    def _observed(self, rollout: Rollout, update: dict[str, Any]) -> dict[str, Any]:
        rates = {f"{n}_optimizer": lr for n, lr in self.trainer.learning_rates.items()}
        return {"lr": rates | self.model.watched()} | {k: v for k, v in update.items() if not np.isscalar(v)}
