"""What the fine-tuning loops share: iterations, evaluations among them, and their state.

A quirk of the reference is kept because its results rest on it: a training iteration after an evaluation goes on from
the evaluation's last observations.
"""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_rl.config.compose import Config, plain_copy
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.typing import Rng
from diffusion_rl.envs.interface import VectorEnv
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.continuation import BEGAN_ANEW, FINE_TUNING_MAY_CHANGE
from diffusion_rl.training.episodes import seeded_options
from diffusion_rl.training.evaluation import make_venv
from diffusion_rl.training.loop import Losses, TrainingLoop, restore_rng, rng_state
from diffusion_rl.training.policy_files import build_policy, evaluation_of, policy_facts
from diffusion_rl.training.rollout import (
    EpisodeStatistics,
    Rollout,
    episode_statistics,
    knows_success,
    no_episode_ended,
    success_threshold,
)
from diffusion_rl.training.run_dir import RunDir
from diffusion_rl.training.run_facts import bounds_path, normalization_facts
from diffusion_rl.training.state_files import StateFiles

log = logging.getLogger(__name__)

Observer = Callable[[dict[str, Any]], None]
OnStep = Callable[[int, np.ndarray], None]


class FineTuning(TrainingLoop):
    """A loop of iterations, each of which collects and updates, or evaluates.

    Args:
        cfg: the configuration (keys as in the reference).
        model, venv, rng: given objects instead of those the configuration describes.
        observer: called once per iteration with everything computed in it; slower, for tests.
    """

    UNIT, LABEL = "iteration", "fine-tuning"
    CURE = "lower train.actor_lr or train.critic_lr, or set train.max_grad_norm"
    HELD_SECONDS = 0.0
    KIND: str  # of its checkpoints
    trainer: Any  # has tensors(), state(), restore(tensors, state)

    def __init__(
        self,
        cfg: Config,
        model: Any = None,
        venv: Any = None,
        rng: Rng | None = None,
        observer: Observer | None = None,
    ):
        self.cfg, self.train, self.observer = cfg, cfg["train"], observer
        self.seed = int(cfg.get("seed", 42))
        self.model = model if model is not None else self._build_policy()
        self.n_envs = int(cfg["env"]["n_envs"])
        self.venv = venv if venv is not None else self._make_venv()
        self.owns_rng = rng is None
        self.rng = NoiseSource(self.seed) if rng is None else rng
        self.act_steps, self.n_steps = int(cfg["act_steps"]), int(self.train["n_steps"])
        self.total, self.units, self.env_steps = int(self.train["n_train_itr"]), self.n_steps, 0
        self.observations: dict[str, np.ndarray] | None = None
        self.done = np.zeros(self.n_envs)
        self.began_anew = False  # goes on, but without the simulators' state
        self.episodes_ended, self._warned = 0, False
        self._row: dict[str, Any] = {}
        self._logged, self._updated = True, False  # the last row; something, in this process
        self.has_success = False

    @property
    def itr(self) -> int:
        """Returns the iteration that comes next, or runs."""
        return self.step

    @property
    def number(self) -> int:
        return self.step - 1

    # ---------- what the loops differ in ----------

    def _build_policy(self) -> Any:
        return build_policy(self.cfg, self.seed)

    def _make_venv(self) -> VectorEnv:
        return make_venv(self.cfg, self.model, self.seed)

    @abc.abstractmethod
    def _collect(self, on_step: OnStep) -> Rollout:
        """Acts in the environments for one iteration."""

    @abc.abstractmethod
    def _evaluate(self, on_step: OnStep) -> Rollout:
        """Acts deterministically."""

    @abc.abstractmethod
    def _update(self, rollout: Rollout) -> dict[str, Any]:
        """Trains on what there is; scalars go into the metrics, everything to the observer."""

    @abc.abstractmethod
    def _end_iteration(self) -> dict[str, Any]:
        """Advances the schedules; returns what to add to the metrics."""

    @abc.abstractmethod
    def _observed(self, rollout: Rollout, update: dict[str, Any]) -> dict[str, Any]:
        """Returns what the observer gets beside the statistics of the episodes."""

    def _live(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the losses that people see of a training iteration."""
        return {}

    def _reported(self, rollout: Rollout, evaluating: bool, stats: EpisodeStatistics) -> EpisodeStatistics:
        """Returns what the metrics say of episodes: of those within this rollout, unless a loop counts otherwise."""
        return stats

    def _evaluating(self) -> bool:
        return self.itr % int(self.train["val_freq"]) == 0 and not self.train.get("force_train", False)

    # ---------- the loop ----------

    def run(self, until: int | None = None) -> list[dict[str, Any]]:
        """Trains as `TrainingLoop.run` does, and closes the environments."""
        settings = plain_copy(self.cfg)
        files = StateFiles(self.KIND, settings, may_change=FINE_TUNING_MAY_CHANGE)
        self.run_dir = RunDir(self.cfg["logdir"], settings, files)
        with contextlib.closing(self.venv):
            return super().run(until)

    def advance(self, end: int) -> tuple[int, Losses]:
        """Makes one iteration, within which losses are looked at."""
        self._row = self._iteration()
        self._logged = self._is_logged(self._row)
        return 1, {}

    def due(self, what: str) -> bool:
        return self._logged if what == "log" else self.number % int(self.train["save_model_freq"]) == 0

    def row(self) -> dict[str, Any]:
        return self._row

    def visible(self, row: Mapping[str, Any]) -> dict[str, Any]:
        shown = {"itr": row["itr"], "kind": row["kind"], "steps": row["env_steps"], "return": row["episode_return"]}
        if self.has_success:
            shown["success"] = row["success_rate"]
        return {**shown, "seconds": row["seconds"], **(self._live(row) if row["kind"] == "train" else {})}

    def evaluation(self) -> str:
        exportable = getattr(self.model, "EXPORTABLE", True)  # else it decides by more than its policy
        return evaluation_of(plain_copy(self.cfg), self.run_dir.path) if exportable else ""

    def _iteration(self) -> dict[str, Any]:
        evaluating = self._evaluating()

        def on_step(step: int, rewards: np.ndarray) -> None:
            self.progress.doing("evaluating" if evaluating else "")
            self.progress.update(1 if step < self.n_steps else 0, turn=False)
            self.run_dir.stop_if_requested()

        rollout = self._evaluate(on_step) if evaluating else self._collect(on_step)
        self.observations, self.done = rollout.last_observations, rollout.firsts[-1]
        told = rollout.successes is not None
        threshold = success_threshold(self.cfg["env"], told)
        self.has_success = told or knows_success(str(self.cfg.get("env_name")))
        stats = episode_statistics(rollout, self.act_steps, threshold)
        reported = self._reported(rollout, evaluating, stats)
        row: dict[str, Any] = {
            "itr": self.itr,
            "kind": "eval" if evaluating else "train",
            "env_steps": self.env_steps,
            "episodes": reported.n_episodes,
            **reported.measured(),
        }
        self._note_episodes(stats.n_episodes, reported.n_episodes)
        if self.began_anew:
            row[BEGAN_ANEW] = True
            self.began_anew = False
        if not evaluating:
            self.progress.doing("updating" if self._updated else "compiling the update")
            self._updated = True
        update = {} if evaluating else self._update(rollout)
        row |= {k: v for k, v in update.items() if np.isscalar(v)}
        row |= self._end_iteration()
        row |= self.venv.measured() if hasattr(self.venv, "measured") else {}
        if self.observer is not None:
            self.observer(self._observed_episodes(rollout, stats, evaluating) | self._observed(rollout, update))
        return row

    def _note_episodes(self, in_rollout: int, reported: int) -> None:
        """Says once when a rollout holds no whole episode."""
        self.episodes_ended += max(in_rollout, reported)
        if not self.episodes_ended and not self._warned and self._counts_rollouts():
            log.warning(no_episode_ended(self.n_steps, self.act_steps, "train.n_steps"))
            self._warned = True

    def _counts_rollouts(self) -> bool:
        """Returns whether episodes are expected to end within each rollout."""
        return True

    def _start(self, options: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns observations to go on from, and marks [E] of episodes that begin."""
        if self.observations is None or self.cfg["env"].get("reset_at_iteration", True):
            return self.venv.reset(options), np.ones(self.n_envs)
        return self.observations, self.done

    def _options(self, seeded: bool = False) -> list[dict[str, Any]]:
        """Returns the options of the environments' resets."""
        options: list[dict[str, Any]] = seeded_options(self.seed, self.n_envs) if seeded else []
        options = options or [{} for _ in range(self.n_envs)]
        render = self.train.get("render", {})
        if self.cfg["env"].get("save_video", False) and self.itr % int(render.get("freq", 1)) == 0:
            for i in range(min(int(render.get("num", 0)), self.n_envs)):
                options[i]["video_path"] = str(self.run_dir.path / "render" / f"itr-{self.itr}_trial-{i}.mp4")
        return options

    def _evaluation_setting(self) -> tuple[Any, list[dict[str, Any]]]:
        """Returns rng and options of an evaluation.

        Always the same episodes, drawn apart from the training's: what is saved can be evaluated again exactly.
        """
        return NoiseSource(self.seed) if self.owns_rng else self.rng, self._options(seeded=self.owns_rng)

    # ---------- state ----------

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns everything a run needs to go on bit for bit, as tensors and JSON metadata."""
        tensors = {f"model.{k}": v for k, v in state_dict(self.model).items()}
        tensors |= self.trainer.tensors()
        tensors["train.done"] = np.asarray(self.done)
        for key, value in (self.observations or {}).items():
            tensors[f"train.observations.{key}"] = np.asarray(value)
        restorable = bool(getattr(self.venv, "restorable", False))
        if restorable:
            tensors |= {f"train.env.{k}": np.asarray(v) for k, v in self.venv.get_state().items()}
        metadata = {
            "kind": self.KIND,
            **policy_facts(self.model),
            "normalization": normalization_facts(bounds_path(self.cfg)),
            "train": {
                "env_steps": self.env_steps,
                "env_restorable": restorable,
                "noise": rng_state(self.rng),
                "trainer": self.trainer.state(),
            },
        }
        return tensors, metadata

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.metadata["train"]
        self._restore_training(checkpoint, state)
        restore_rng(self.rng, state["noise"])
        self.step, self.env_steps = int(checkpoint.metadata["itr"]) + 1, int(state["env_steps"])
        before = len(checkpoint.tensors["train.done"])
        if before != self.n_envs:
            self.began_anew = True
            log.warning("env.n_envs was %d, now it is %d: the run goes on with new episodes", before, self.n_envs)
        elif state["env_restorable"] and getattr(self.venv, "restorable", False):
            self.venv.set_state(checkpoint.select("train.env."))
            self.observations = checkpoint.select("train.observations.")
            self.done = checkpoint.tensors["train.done"]
        else:
            self.began_anew = True
            log.warning("these environments cannot be restored: the run goes on with new episodes")

    def _restore_training(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """Takes back weights, optimizers and what else the loop itself has put into `state`."""
        load_state_dict(self.model, checkpoint.select("model."))
        self.trainer.restore(checkpoint.tensors, state["trainer"])

    # ---------- watching ----------

    def _is_logged(self, row: dict[str, Any]) -> bool:
        """Returns whether this row goes into the metrics."""
        return True

    def _observed_episodes(self, rollout: Rollout, stats: EpisodeStatistics, evaluating: bool) -> dict[str, Any]:
        return {
            "itr": self.itr,
            "eval_mode": evaluating,
            "reward_trajs": rollout.rewards,
            "terminated_trajs": rollout.terminated,
            "firsts_trajs": rollout.firsts,
            "obs_trajs": rollout.observations["state"],
            "avg_episode_reward": stats.mean_return,
            "avg_best_reward": stats.mean_best_reward,
            "success_rate": stats.success_rate,
            "num_episode_finished": stats.n_episodes,
            "lr": {f"{n}_optimizer": lr for n, lr in self.trainer.learning_rates.items()},
        }
