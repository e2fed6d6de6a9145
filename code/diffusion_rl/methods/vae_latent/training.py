"""The training loop of VAE + Diffusion RL: VAE, offline steps, collections, online steps, evaluations, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_rl.config.compose import plain_copy
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.returns import gae
from diffusion_rl.core.reward_scaling import RunningRewardScaler
from diffusion_rl.core.typing import Rng
from diffusion_rl.data.agent_windows import VAESequenceDataset
from diffusion_rl.data.windows import WindowOrder
from diffusion_rl.methods.vae_latent.evaluation import decoder, evaluate_policy, evaluating_actor, write_result
from diffusion_rl.methods.vae_latent.history import AgentHistoryEnv
from diffusion_rl.methods.vae_latent.model import Batch, Draws, LatentDiffusionRL
from diffusion_rl.methods.vae_latent.trainer import COPY, KEEP, LatentTrainer
from diffusion_rl.policies.acting import DiffusionActor
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.continuation import LATENT_MAY_CHANGE, Spelling, program
from diffusion_rl.training.loop import Losses, TrainingLoop, part_tensors, restore_parts
from diffusion_rl.training.rollout import Rollout, RunningEpisodes, collect
from diffusion_rl.training.run_dir import RunDir
from diffusion_rl.training.state_files import StateFiles

STEPS_PER_CALL = 25  # of the compiled offline function
GO_ON = "continue_training: true"
SPELLING = Spelling(GO_ON, "give another logbase, exp_name or job_name", GO_ON)


class VAEDiffusionTraining(TrainingLoop):
    """Trains, in the run folder `cfg.logdir`.

    Args:
        cfg: the settings (cfg/planning/vae_diffusion_rl.yaml) with `logdir`.
        algorithm, dataset: what is trained, and on what.
        venv: to collect in (None: offline only);  eval_venv: to evaluate in (None: no evaluation).
        facts: of the run, for its checkpoints (JSON values).
    """

    CURE = "lower the learning rates"

    def __init__(
        self,
        cfg: Mapping[str, Any],
        algorithm: LatentDiffusionRL,
        dataset: VAESequenceDataset,
        venv: AgentHistoryEnv | None,
        eval_venv: AgentHistoryEnv | None,
        facts: Mapping[str, Any],
    ):
        self.cfg, self.algorithm, self.dataset, self.facts = cfg, algorithm, dataset, dict(facts)
        self.venv, self.eval_venv = venv, eval_venv
        self.trainer, self.rng = LatentTrainer(algorithm), NoiseSource(int(cfg["seed"]))
        size = int(cfg["batch_size"]) * int(cfg["gradient_accumulate_every"])
        self.windows = WindowOrder(len(dataset), min(size, len(dataset)), self.rng)
        self.windows.count -= len(dataset) % self.windows.size  # whole batches: one compiled program
        due = [int(cfg[key]) for key in ("n_train_steps", "log_freq", "save_freq")]
        due += [int(cfg["rl_warmup_steps"])] if cfg["online_training"] else []
        self.per_call = _even(math.gcd(*due))  # offline steps; always as many, since every number is compiled anew
        self.total, self.env_steps = int(cfg["n_train_steps"]), 0
        self.actor: DiffusionActor | None = None  # while online
        self.evaluating: DiffusionActor | None = None
        self.decode = decoder(algorithm)
        self.scaler = RunningRewardScaler(int(cfg["rl_num_envs"])) if cfg["reward_scale_running"] else None
        self.observations: dict[str, np.ndarray] | None = None
        self.firsts = np.ones(int(cfg["rl_num_envs"]))
        self.episodes = RunningEpisodes(int(cfg["rl_num_envs"]))
        self.order = np.arange(0)  # of the samples in the minibatches of stage 3
        self.stopped = False  # target_kl was passed in this collection
        self.sums: dict[str, list[float]] = {}  # losses since the last log line
        settings = plain_copy(cfg)
        files = StateFiles(algorithm.KIND, settings, may_change=LATENT_MAY_CHANGE)
        self.run_dir: RunDir = RunDir(cfg["logdir"], settings, files, SPELLING)

    # ---------- the loop ----------

    def begin(self) -> None:
        if self.step == 0:
            self._pretrain_vae()

    def advance(self, end: int) -> tuple[int, Losses]:
        """Makes the next step or, offline, steps up to where something is due; collects first where that is due."""
        if self._online_begins():
            self.algorithm.begin_online()
            self.trainer.compile()
            self.evaluating = None
        if self.algorithm.online and self._every("rl_collect_freq"):
            self._collect()
        return self._steps(end), {}

    def due(self, what: str) -> bool:
        return self._every(f"{what}_freq") or self.step == self.total

    def is_whole(self) -> bool:
        """Says False within a collection: a rollout is not part of the state."""
        return not self.algorithm.online or self._every("rl_collect_freq")

    def visible(self, row: Mapping[str, Any]) -> dict[str, Any]:
        shown = {"step": row["itr"], "kind": row["kind"], "env steps": row["env_steps"]}
        losses = {k: v for k, v in row.items() if k in METRICS and v is not None}
        return {**shown, "return": row.get("episode_return"), "seconds": row.get("seconds"), **losses}

    def evaluation(self) -> str:
        return program("script/evaluate_experiment.py", "-e", str(self.run_dir.path))

    def saved(self, keep: bool) -> None:
        if self.cfg["eval_freq"] and self.due("save") and self.due("eval"):
            self._evaluate()

    def _every(self, key: str) -> bool:
        return self.step % int(self.cfg[key]) == 0

    def _online_begins(self) -> bool:
        cfg = self.cfg
        return bool(cfg["online_training"]) and not self.algorithm.online and self.step >= int(cfg["rl_warmup_steps"])

    def _steps(self, end: int) -> int:
        """Makes the next steps; returns how many."""
        cfg = self.cfg
        if self.algorithm.online and self._every("rl_update_freq") and not self.stopped:
            self._note({k: [v] for k, v in self._online_step().items()})
            return 1
        stops = [end] + ([int(cfg["rl_warmup_steps"])] if cfg["online_training"] else [])
        every = ["log_freq", "save_freq"] + (["rl_collect_freq", "rl_update_freq"] if self.algorithm.online else [])
        stops += [(self.step // int(cfg[key]) + 1) * int(cfg[key]) for key in every]
        count = min(self.per_call, *(stop - self.step for stop in stops if stop > self.step))
        if not (self.algorithm.online and not cfg["offline_rl_weight"]):
            batches, draws = self._draw(count)
            decays = np.array([self._decay(self.step + i) for i in range(count)])
            self._note(self.trainer.offline(batches, draws, decays))
        return count

    def _decay(self, step: int) -> float:
        """Returns the decay of the averaged weights after that step: while stage 1 is young they are a copy."""
        if step % int(self.cfg["update_ema_every"]):
            return KEEP
        young = step < int(self.cfg["step_start_ema"]) and not self.algorithm.online
        return COPY if young else float(self.cfg["ema_decay"])

    def _note(self, losses: Mapping[str, Any]) -> None:
        self.check_finite(losses, self.step)
        for name, values in losses.items():
            self.sums.setdefault(name, []).extend(np.asarray(values).tolist())

    # ---------- stages 0 to 2 ----------

    def _pretrain_vae(self) -> None:
        steps = int(self.cfg["vae_pretrain_steps"])
        count = _even(steps)
        for _ in range(steps // count):
            self._note(self.trainer.pretrain_vae(*self._draw(count)))
            self.run_dir.stop_if_requested()
        if self.sums:
            last = {name: float(np.mean(values[-100:])) for name, values in self.sums.items()}
            self.run_dir.log({"itr": 0, "kind": "vae", **last})
        self.sums = {}

    def _draw(self, count: int) -> tuple[Batch, Draws]:
        """Draws batches and noise of `count` steps, step by step so that a run in pieces has the same."""
        drawn = [self._draw_one() for _ in range(count)]
        return _joined([batch for batch, _ in drawn]), _joined([draws for _, draws in drawn])

    def _draw_one(self) -> tuple[Batch, Draws]:
        cfg, p, rng = self.cfg, self.algorithm.policy, self.rng
        batch = Batch(**self.dataset.batch(next(self.windows), transitions=bool(cfg["offline_rl"])))
        size = len(batch.state)
        shape = (size, p.horizon_steps, p.action_dim)
        chain = (int(cfg["n_ddim_steps"]) + 1, *shape)
        return batch, Draws(
            t=rng.integers(0, p.denoising_steps, (size,)),
            noise=rng.normal(shape),
            vae_noise=rng.normal(shape),
            keep=keep_returns(rng, size, cfg["condition_dropout"]) if cfg["returns_condition"] else None,
            sample_noise=rng.normal(chain) if cfg["use_behavior_cloning"] or cfg["offline_rl"] else None,
            next_noise=rng.normal(chain) if cfg["offline_rl"] else None,
        )

    # ---------- stage 3 ----------

    def _collect(self) -> None:
        """Acts with the policy under training, whose log-probabilities the ratio of the updates begins from."""
        assert self.venv is not None
        cfg = self.cfg
        if self.actor is None:
            self.actor = DiffusionActor(self.algorithm.acting(self.algorithm.policy.actor_ft), bool(cfg["fast"]))
        self.actor.weights_changed()
        if self.observations is None:
            self.observations = self.venv.reset()
        actor, finals = self.actor, list[tuple[np.ndarray, np.ndarray]]()

        def decide(seen: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
            decision = actor.act(seen["state"], actor.draw(self.rng, len(seen["state"])), deterministic=False)
            assert decision.chains is not None
            return self.decode(decision.actions), {"chains": decision.chains, "log_probs": decision.log_probs}

        def store(seen: dict[str, np.ndarray], actions: np.ndarray, result: Any) -> None:
            finals.append((result.truncated & ~result.terminated, result.infos["final_observations"]["state"]))

        rollout = collect(
            self.venv,
            decide,
            int(cfg["rl_collect_steps"]),
            self.observations,
            self.firsts,
            int(cfg["act_steps"]),
            lambda step, rewards: self.run_dir.stop_if_requested(),
            store,
        )
        self.observations, self.firsts = rollout.last_observations, rollout.firsts[-1]
        self.env_steps += rollout.rewards.size * int(cfg["act_steps"])
        self.episodes.add(rollout)
        self._load(rollout, np.stack([cut for cut, _ in finals]), np.stack([state for _, state in finals]))
        self.order, self.stopped = np.arange(0), False

    def _load(self, rollout: Rollout, cut: np.ndarray, finals: np.ndarray) -> None:
        """Computes advantages by GAE, with the value of the last state where an episode was cut [S,E], not ended."""
        cfg, trainer = self.cfg, self.trainer
        state = rollout.observations["state"]
        steps, envs = rollout.rewards.shape

        def values(states: np.ndarray) -> np.ndarray:
            if not cfg["use_value_function"]:
                return np.zeros(states.shape[:-2], np.float32)
            return trainer.values(states.reshape(-1, *states.shape[-2:])).reshape(states.shape[:-2])

        rewards = rollout.rewards * float(cfg["reward_scale"])
        if self.scaler is not None:
            rewards = self.scaler(rewards.T, rollout.firsts[:-1].T).T
        discount = float(cfg["discount"]) ** int(cfg["act_steps"])
        rewards = rewards + discount * cut * values(finals)
        ends = np.maximum(rollout.terminated, cut)
        lam = float(cfg["gae_lambda"]) if cfg["use_value_function"] else 1.0
        now = values(state)
        advantages, returns = gae(rewards, now, values(rollout.last_observations["state"]), ends, discount, lam)
        flat = {"returns": returns, "values": now, "advantages": advantages}
        arrays = {"state": state, **rollout.decisions}
        trainer.load(
            {k: v.reshape(steps * envs, *v.shape[2:]) for k, v in arrays.items()}
            | {k: v.reshape(-1) for k, v in flat.items()}
        )

    def _online_step(self) -> dict[str, float]:
        """Updates on a minibatch of the collection, and on a batch of the data where L_off has a weight."""
        cfg, size = self.cfg, int(self.cfg["rl_batch_size"])
        samples = int(cfg["rl_collect_steps"]) * int(cfg["rl_num_envs"])
        if len(self.order) < size:
            self.order = self.rng.permutation(samples)
        items, self.order = self.order[:size], self.order[size:]
        batch, draws = self._draw_one() if cfg["offline_rl_weight"] else (None, None)
        losses = self.trainer.online(items, batch, draws, self._decay(self.step))
        if cfg["target_kl"] is not None and losses["approx_kl"] > float(cfg["target_kl"]):
            self.stopped = True
        return losses

    # ---------- watching ----------

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"itr": self.step, "kind": "train", "env_steps": self.env_steps}
        row |= {name: None for name in METRICS} | {name: float(np.mean(v)) for name, v in self.sums.items() if v}
        stats = self.episodes.statistics(1, math.inf)
        if stats.n_episodes:
            row["episode_return"] = stats.mean_return
        self.episodes.clear()
        self.sums = {}
        return row

    def _evaluate(self) -> None:
        if self.eval_venv is None:
            return
        cfg = self.cfg
        if self.evaluating is None:
            self.evaluating = evaluating_actor(self.algorithm, cfg)
        self.evaluating.weights_changed()
        episodes = evaluate_policy(self.decode, self.eval_venv, cfg, self.evaluating)
        write_result(self.run_dir.path, self.step, episodes, cfg)
        mean = float(np.mean(episodes.returns))
        row = {"itr": self.step, "kind": "eval", "env_steps": self.env_steps, "episode_return": mean}
        self.run_dir.log({**row, "std_return": float(np.std(episodes.returns)), "episodes": len(episodes.returns)})
        self.progress.row(self.visible(row))

    # ---------- state ----------

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns everything that decides on the next step, as tensors and JSON values."""
        tensors = weights(self.algorithm)
        tensors |= part_tensors({f"optimizer.{name}": optimizer for name, optimizer in self.trainer.optimizers.items()})
        tensors |= {f"normalizer.{k}": v for k, v in self.dataset.normalizer.tensors().items()}
        tensors |= {"train.order": self.windows.order, "train.firsts": self.firsts}
        tensors |= {f"train.episodes.{k}": v for k, v in self.episodes.state().items()}
        restorable = self.venv is not None and self.venv.restorable and self.observations is not None
        if restorable:
            tensors |= {f"train.env.{k}": v for k, v in self.venv.get_state().items()}  # type: ignore[union-attr]
        state = {
            "position": self.windows.position,
            "noise": self.rng.state(),
            "env_steps": self.env_steps,
            "online": self.algorithm.online,
            "restorable": restorable,
            "scaler": self.scaler.state() if self.scaler else None,
        }
        return tensors, {**self.facts, "train": state, "online": self.algorithm.online}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on where `state` was taken. Environments that cannot be restored begin new episodes."""
        state = checkpoint.metadata["train"]
        load_weights(self.algorithm, checkpoint)
        for name, optimizer in self.trainer.optimizers.items():
            rate = optimizer.learning_rate.numpy()  # the experiment's, which may have been changed
            optimizer.restore(checkpoint.select(f"optimizer.{name}."))
            optimizer.learning_rate.assign(rate)
        self.trainer.compile()
        self.windows.order, self.windows.position = checkpoint.tensors["train.order"], int(state["position"])
        self.rng.restore(state["noise"])
        self.step, self.env_steps = int(checkpoint.metadata["itr"]), int(state["env_steps"])
        self.episodes.restore(checkpoint.select("train.episodes."))
        if self.scaler and state["scaler"]:
            self.scaler.restore(state["scaler"])
        if state["restorable"] and self.venv is not None:
            self.venv.set_state(checkpoint.select("train.env."))
            self.observations, self.firsts = {"state": self.venv.state.copy()}, checkpoint.tensors["train.firsts"]
        else:
            self.episodes.interrupt()


METRICS = ("loss", "diffusion_loss", "vae_loss", "vae_recon_loss", "vae_kl_loss", "policy_loss", "value_loss")


def keep_returns(rng: Rng, size: int, dropout: float) -> np.ndarray:
    """Draws [B,1]: 0 with probability `dropout` (the return is hidden), else 1."""
    return (rng.uniform((size, 1)) >= dropout).astype(np.float32)


def weights(algorithm: LatentDiffusionRL) -> dict[str, np.ndarray]:
    """Returns the weights of all its networks, under `model.<network>.`."""
    return part_tensors(_modules(algorithm))


def load_weights(algorithm: LatentDiffusionRL, checkpoint: Checkpoint) -> None:
    """Takes back what `weights` returned, and whether stage 3 had begun."""
    restore_parts(_modules(algorithm), checkpoint)
    algorithm.online = bool(checkpoint.metadata["online"])


def _modules(algorithm: LatentDiffusionRL) -> dict[str, Any]:
    return {f"model.{name}": module for name, module in algorithm.modules().items()}


def _even(steps: int) -> int:
    """Returns the largest number of steps of a call that divides them."""
    return max(n for n in range(1, STEPS_PER_CALL + 1) if steps % n == 0)


def _joined(rows: list[Any]) -> Any:
    columns = zip(*rows, strict=True)
    return type(rows[0])(*(None if column[0] is None else np.stack(column) for column in columns))
