"""DiffuserLite's modes: from options to data, training, the reflow, episodes and timings."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import write_json
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.core.programs import GO_ON
from diffusion_rl.core.threads import configure_threads
from diffusion_rl.data.locate import find_flat
from diffusion_rl.data.plan_windows import PlanDataset, conditions, transitions
from diffusion_rl.envs.make import make_vector_env
from diffusion_rl.methods.diffuser_lite import files
from diffusion_rl.methods.diffuser_lite.acting import decision_times, run_lite_episodes
from diffusion_rl.methods.diffuser_lite.domains import DOMAINS, Targets, antmaze_targets, kitchen_targets, return_scale
from diffusion_rl.methods.diffuser_lite.iql import IQL, IQLTrainer
from diffusion_rl.methods.diffuser_lite.levels import Acting, PlanLevel, level_shapes
from diffusion_rl.methods.diffuser_lite.options import LiteOptions, parse
from diffusion_rl.methods.diffuser_lite.planner import DiffuserLite
from diffusion_rl.methods.diffuser_lite.trainer import (
    InverseTrainer,
    LevelTrainer,
    LiteTrainer,
    PlanSource,
    ReflowTrainer,
)
from diffusion_rl.methods.diffuser_lite.training import Generation, PlanTraining, QLearning, Reflow
from diffusion_rl.networks.dit import ConditionalDiT
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.networks.iql import StateValue
from diffusion_rl.reports import lite_figures
from diffusion_rl.tasks.registry import dims_of, normalized_score, steps_of
from diffusion_rl.training.continuation import Spelling, program
from diffusion_rl.training.locks import locked
from diffusion_rl.training.run_dir import RunDir

SPELLING = Spelling(GO_ON, "name another results_dir", GO_ON)


def mujoco(arguments: Sequence[str]) -> None:
    """Runs `pipelines/diffuserlite_d4rl_mujoco.py`."""
    Pipeline("mujoco", arguments).run()


def kitchen(arguments: Sequence[str]) -> None:
    """Runs `pipelines/diffuserlite_d4rl_kitchen.py`."""
    Pipeline("kitchen", arguments).run()


def antmaze(arguments: Sequence[str]) -> None:
    """Runs `pipelines/diffuserlite_d4rl_antmaze.py`."""
    Pipeline("antmaze", arguments).run()


class Pipeline:
    """One mode of one task of a domain ("mujoco", "kitchen", "antmaze"), with the arguments of its command line."""

    def __init__(self, kind: str, arguments: Sequence[str]):
        options: LiteOptions = parse(kind, arguments)
        self.arguments, self.options = arguments, options
        self.folder, self.results = options.folder, Path(options.results_dir)
        self.kind, self.name, self.domain = options.kind, options.env_name, DOMAINS[options.kind]
        self.rng = NoiseSource(options.seed)
        self.shapes = level_shapes(self.domain.horizons)
        if str(options.device).startswith("cpu"):
            tf.config.set_visible_devices([], "GPU")
        configure_threads(shared=options.mode not in ("training", "reflow"))  # these train the levels side by side

    def run(self) -> None:
        """Does what `mode` says; one process at a time trains in a task's folder."""
        mode = self.options.mode
        if mode == "training":  # its run folder is the task's, and has the lock itself
            with locked(self.folder, SPELLING.anew):
                self.take_back()
            self.training()
            return
        with contextlib.nullcontext() if mode in ("inference", "benchmark") else locked(self.folder, SPELLING.anew):
            self.take_back()
            getattr(self, mode)()

    def take_back(self) -> None:
        """Copies a backup into the results."""
        if self.options.restore_from:
            count = files.mirror(self._existing(self.options.restore_from), self.results)
            print(f"{count} files from {self.options.restore_from}")

    @staticmethod
    def _existing(path: str) -> Path:
        if not Path(path).is_dir():
            raise UserError(f"restore_from={path}: no such folder")
        return Path(path)

    def backup(self) -> None:
        if self.options.backup_dir:
            files.mirror(self.results, Path(self.options.backup_dir))

    # ---------- parts ----------

    @cached_property
    def flat(self) -> dict[str, np.ndarray]:
        """Returns all rows of the data."""
        return find_flat(self.name, self.options.data_dir)

    @cached_property
    def data(self) -> PlanDataset:
        options = vars(self.options)
        penalty = options.get("terminal_penalty", options.get("noreaching_penalty"))
        spans = [shape.span for shape in self.shapes]
        data = PlanDataset(self.flat, self.kind, spans, self.options.discount, penalty)
        if (dims := (data.observation_dim, data.action_dim)) != self.dims:
            raise UserError(f"the data have (observation, action) widths {dims}, {self.name} has {self.dims}")
        return data

    @property
    def dims(self) -> tuple[int, int]:
        """Returns O and A."""
        return dims_of(self.name)

    @property
    def limit(self) -> int:
        """Returns the steps of an episode."""
        return steps_of(self.name)

    @cached_property
    def levels(self) -> list[PlanLevel]:
        """Builds the levels, with new weights."""
        o, width = self.options, self.dims[0]
        network = {k: getattr(o, k) for k in ("emb_dim", "d_model", "n_heads", "depth", "standard_residual")}
        with initial_weights(self.rng):
            return [
                PlanLevel(
                    ConditionalDiT(width, **network), shape.states, width, i == 0, o.next_obs_loss_weight, o.backbone
                )
                for i, shape in enumerate(self.shapes)
            ]

    @cached_property
    def inverse(self) -> InverseDynamics:
        with initial_weights(self.rng):
            return InverseDynamics(*self.dims)

    @cached_property
    def iql(self) -> IQL:
        o = self.options
        with initial_weights(self.rng):
            return IQL(
                *self.dims, discount=o.discount, hidden_dim=o.iql_hidden_dim, target_updates=o.iql_target_updates
            )

    def value(self) -> StateValue | None:
        """Loads the trained values, for tasks that need them."""
        if not self.domain.has_values:
            return None
        files.load_network(self.folder, "iql", self.iql)
        return self.iql.V

    @cached_property
    def source(self) -> PlanSource:
        """Returns the data as the training sees them."""
        data, value, values = self.data, self.value(), None
        if value is not None:
            parts = np.array_split(data.states, max(len(data.states) // 50000, 1))
            values = np.concatenate([value(tf.constant(part)).numpy()[:, 0] for part in parts])
        scale = self.options.task.get("return_scale") or return_scale(self.name)
        targets = [conditions(data, i, scale, values) for i in range(len(self.shapes))]
        rows = [data.rows(i, stride=shape.stride) for i, shape in enumerate(self.shapes)]
        padding = data.padding if self.options.mask_padding else None
        return PlanSource(data.states, data.actions, rows, targets, tf.float32, padding)

    def trainers(self) -> list[LevelTrainer]:
        return [LevelTrainer(level, self.options.learning_rate, self.options.ema_rate) for level in self.levels]

    # ---------- modes that train ----------

    def iql_training(self) -> None:
        o, normal = self.options, self.data.normalizer.normalize
        rows = transitions(self.flat)
        rewards = self.domain.learned_reward(rows["rewards"].astype(np.float32))
        before, after = (normal(rows[name].astype(np.float32)) for name in ("observations", "following"))
        columns = [before, rows["actions"], rewards[:, None], after, rows["terminals"][:, None]]
        columns = [np.asarray(column, np.float32) for column in columns]
        self._train(
            partial(QLearning, IQLTrainer(self.iql), columns, self.rng, batch_size=o.iql_batch_size),
            o.iql_gradient_steps,
            lambda step, labels: files.save_network(self.folder, "iql", self.iql, labels),
            "iql_loss_log.json",
        )

    def training(self) -> None:
        o = self.options
        trainer = LiteTrainer(self.trainers(), InverseTrainer(self.inverse, o.invdyn_learning_rate), self.source)

        def save(step: int, labels: Sequence[int | str]) -> None:
            files.save_normalizer(self.folder, self.data.normalizer.arrays)
            files.save_levels(self.folder, "diffusion", self.levels, labels)
            if step - o.save_interval < o.invdyn_gradient_steps:  # trained since the last save
                files.save_network(self.folder, "invdyn", self.inverse, labels)

        sizes = {"batch_size": o.batch_size, "invdyn_steps": o.invdyn_gradient_steps}
        build = partial(PlanTraining, trainer, self.data, self.rng, rate=o.learning_rate, **sizes)
        self._train(build, o.diffusion_gradient_steps, save, "loss_log.json")

    def prepare_dataset(self) -> None:
        o = self.options
        files.load_levels(self.folder, "diffusion", self.levels, o.reflow_backbone_ckpt)
        batch, steps = o.dataset_prepare_batch_size, o.dataset_prepare_sampling_steps
        generation = Generation(self.levels, self.data, self.source.plans, batch, steps)
        sizes = o.cond_dataset_size, o.uncond_dataset_size
        with files.pairs_to_write(self.folder, self.levels, *sizes, o.pairs_dtype) as write:
            generation.run(self.rng, *sizes, write)
        self.backup()

    def reflow(self) -> None:
        o = self.options
        files.load_levels(self.folder, "diffusion", self.levels, o.reflow_backbone_ckpt)
        print(f"learning rate of the reflow: {o.reflow_lr}")
        with files.pairs_to_read(self.folder, self.levels) as pairs:
            trainer = ReflowTrainer(self.trainers())
            self._train(
                partial(Reflow, trainer, pairs, self.rng, batch_size=o.batch_size, rate=o.reflow_lr),
                o.reflow_gradient_steps,
                lambda step, labels: files.save_levels(self.folder, "reflow", self.levels, labels),
                "reflow_loss_log.json",
            )

    def _train(self, build: Any, steps: int, save: Any, log_name: str) -> None:
        """Runs a loop in its folder (of the training the task's, of others one in it), and draws its losses."""
        o, mode = self.options, self.options.mode
        log = files.LossLog(self.folder, self.results, log_name)
        settings = {"name": o.pipeline_name, "env_name": self.name, **vars(o)}
        state_files = files.PipelineFiles(self.folder, settings, steps, save, log, self.backup)
        folder = self.folder if mode == "training" else self.folder / mode
        run_dir = RunDir(folder, settings, state_files, replace(SPELLING, evaluate=self._acting()))
        intervals = {"log_interval": o.log_interval, "save_interval": o.save_interval}
        build(steps=steps, run_dir=run_dir, record=log.add, **intervals).run()
        curves = lite_figures.by_name(list(log.rows.values()))
        lite_figures.plot_loss_curves(curves, self.results / lite_figures.FIGURES)
        self.backup()

    def _acting(self) -> str:
        """Returns the command that acts with what this mode trains."""
        words = [word for word in self.arguments if not word.startswith(("mode=", "test_model="))]
        model = ["test_model=R2"] if self.options.mode == "reflow" else []
        return program(f"pipelines/diffuserlite_d4rl_{self.kind}.py", *words, "mode=inference", *model)

    # ---------- modes that act ----------

    def planner(self, label: int | str | None, means: np.ndarray, stds: np.ndarray) -> DiffuserLite:
        """Returns the planner of `test_model`; with weights of a step, or new ones for None."""
        o, model = self.options, self.options.test_model
        steps = o.sampling_steps or self.domain.steps_of(model)
        options: dict[str, Any] = {"steps": steps, "temperature": o.temperature, "use_ema": o.use_ema}
        options["guidance"] = self.domain.guidance or (float(o.of_task("w_cfg")),) * len(self.shapes)
        if self.domain.has_values:
            options |= {"candidates": o.num_candidates, "judged": self.domain.judged}
        value = None
        if label is not None:
            files.load_levels(self.folder, "reflow" if model == "R2" else "diffusion", self.levels, label)
            files.load_network(self.folder, "invdyn", self.inverse, o.invdyn_ckpt)
            value = self.value()
        elif self.domain.has_values:
            value = self.iql.V
        return DiffuserLite(self.levels, self.inverse, means, stds, Acting(**options), value, self.runtime)

    @property
    def runtime(self) -> str:
        automatic = "graph" if tf.config.get_visible_devices("GPU") else "tflite"
        return automatic if self.options.runtime == "auto" else self.options.runtime

    def targets(self) -> Targets:
        """Returns the function that gives the returns to ask for."""
        o, name = self.options, self.name
        if self.kind == "kitchen":
            return lambda observations, returns: kitchen_targets(name, returns)
        if self.kind == "antmaze":
            return lambda observations, returns: antmaze_targets(name, observations, o.upstream_typo)
        wanted = float(o.of_task("target_return"))
        return lambda observations, returns: np.full(len(observations), wanted, np.float32)

    def inference(self) -> None:
        """Runs episodes with one checkpoint, or with each one in turn."""
        o, r2 = self.options, self.options.test_model == "R2"
        label = o.reflow_ckpt if r2 else o.diffusion_ckpt
        steps = files.saved_steps(self.folder, "reflow0" if r2 else "diffusion0")
        if label == "all" and not steps:
            raise UserError(f"no numbered checkpoint in {self.folder}: run mode={'reflow' if r2 else 'training'} first")
        rows = []
        for checkpoint in steps if label == "all" else [label]:
            rows.append(self._evaluate(checkpoint))
            write_json(self.folder / f"inference_results_{o.test_model}.json", rows)
        if label == "all":
            print(lite_figures.plot_scores(rows, self.results / lite_figures.FIGURES))
        self.backup()

    def _evaluate(self, label: int | str) -> dict[str, Any]:
        o = self.options
        fitted = files.load_normalizer(self.folder, lambda: self.data.normalizer.arrays)
        planner = self.planner(label, fitted["means"], fitted["stds"])
        env = {"name": self.name, "n_envs": o.num_envs, "max_episode_steps": self.limit}
        venv = make_vector_env(env, obs_dim=self.dims[0], action_dim=self.dims[1], act_steps=1, seed=o.seed)
        rng, returns, seconds = NoiseSource(o.seed), [], []
        published = self.kind if o.published_accounting else ""
        try:
            for episode in range(o.num_episodes):
                first = o.seed + episode * o.num_envs
                resets = [{"seed": first + i} for i in range(o.num_envs)]
                episodes = run_lite_episodes(
                    planner,
                    venv,
                    rng,
                    self.targets(),
                    limit=self.limit,
                    published=published,
                    reset_options=resets,
                )
                returns.append(episodes.published if published else episodes.returns)
                seconds += episodes.seconds
        finally:
            venv.close()
        scores = 100 * normalized_score(self.name, np.minimum(np.concatenate(returns), self.domain.best_return))
        error = float(scores.std() / np.sqrt(len(scores)))
        row = {"checkpoint": label, "test_model": o.test_model, "score": float(scores.mean()), "standard_error": error}
        row |= {"episodes": len(scores), "milliseconds_per_decision": 1000 * float(np.mean(seconds))}
        print(f"{label}: score {row['score']:.1f} +/- {error:.2f} over {len(scores)} episodes", flush=True)
        return row

    def benchmark(self) -> None:
        """Measures decisions per second at batch 1 and `num_envs`, with new weights (their values do not matter
        here)."""
        o, (width, _) = self.options, self.dims
        for model in ("R1", "R2"):
            o.test_model = model
            planner = self.planner(None, np.zeros(width, np.float32), np.ones(width, np.float32))
            for n_envs in (1, o.num_envs):
                times = decision_times(planner, self.rng, n_envs, o.benchmark_decisions, o.benchmark_warm_up)
                median = float(np.median(times))
                facts = {"model": model, "batch": n_envs, "milliseconds": round(1000 * median, 3)}
                facts |= {"hz": round(1 / median, 1), "mean_hz": round(1 / float(times.mean()), 1)}
                facts |= {"device": _device(), "dtype": "float32", "runtime": self.runtime}
                print(json.dumps(facts), flush=True)


def _device() -> str:
    return "GPU" if tf.config.get_visible_devices("GPU") else "CPU"
