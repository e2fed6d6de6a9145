"""Replay of DiffuserLite's whole scripts: Q-learning, training, data for the reflow, reflow, acting with R1 and R2."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.noise import NoiseTape
from diffusion_rl.data.plan_windows import PlanDataset, conditions
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.methods.diffuser_lite.acting import run_lite_episodes
from diffusion_rl.methods.diffuser_lite.domains import DOMAINS, antmaze_targets, kitchen_targets, return_scale
from diffusion_rl.methods.diffuser_lite.iql import IQL, IQLTrainer
from diffusion_rl.methods.diffuser_lite.levels import Acting, PlanLevel, level_shapes
from diffusion_rl.methods.diffuser_lite.planner import DiffuserLite
from diffusion_rl.methods.diffuser_lite.trainer import (
    InverseTrainer,
    LevelTrainer,
    LiteTrainer,
    PlanSource,
    ReflowTrainer,
    cosine_rate,
)
from diffusion_rl.methods.diffuser_lite.training import Generation, LiteLoop, Pairs, PlanTraining, QLearning, Reflow
from diffusion_rl.networks.dit import ConditionalDiT
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.training.run_dir import Nowhere
from parity_tests.replay import build as builder
from parity_tests.replay.compare import Comparison, Mismatch
from parity_tests.replay.diffuser_lite_runs import RATE, both, check, dataset_of, load_level
from parity_tests.replay.files import Golden, Outputs
from parity_tests.replay.scripted import Step

IQL_DRAWS = 4  # permutations that were used; each is followed by one that was not


class Answers:
    """The scripted environments in one of their episodes, [T,E,...]; keeps the actions."""

    def __init__(self, golden: Golden, episode: int):
        self.given = {k: v[episode] for k, v in golden.subgroup("env").items()}
        self.n_envs, self.step_number = self.given["rew"].shape[1], 0
        self.actions: list[np.ndarray] = []

    def reset(self, options: Any = None) -> dict[str, np.ndarray]:
        return {"state": self.given["obs"][0][:, None]}

    def step(self, actions: np.ndarray) -> Step:
        t, given = self.step_number, self.given
        self.actions.append(actions[:, 0])
        self.step_number += 1
        state, done = {"state": given["obs"][t + 1][:, None]}, given["done"][t]
        return Step(state, given["rew"][t], done, np.zeros_like(done), {})


class Saving(Nowhere):
    """Calls a function with the step where a checkpoint that stays would be written."""

    def __init__(self, save: Callable[[int], None]):
        super().__init__()
        self.save = save

    def remember(self, number: int, tensors: Any, metadata: Any, keep: bool) -> None:
        if keep:
            self.save(number)


class Pipeline:
    """All stages of a script, one after the other, with what each leaves for the next."""

    def __init__(self, golden: Golden):
        self.golden, params = golden, golden.meta["params"]
        self.kind, self.args, self.params = params["kind"], params["args"], params
        shapes = level_shapes(DOMAINS[self.kind].horizons)
        self.strides = [shape.stride for shape in shapes]
        discount = {"discount": self.args["discount"], "horizons": [shape.span for shape in shapes]}
        penalties = {"mujoco": "terminal_penalty", "antmaze": "noreaching_penalty"}
        if self.kind in penalties:
            discount[penalties[self.kind]] = self.args[penalties[self.kind]]
        self.data: PlanDataset = dataset_of(golden, discount, self.kind)
        width, action_dim = self.data.observation_dim, self.data.action_dim
        network = {k: self.args[k] for k in ("emb_dim", "d_model", "n_heads", "depth")}
        weight = self.args["next_obs_loss_weight"]
        self.levels = [
            PlanLevel(ConditionalDiT(width, **network), shape.states, width, i == 0, weight)
            for i, shape in enumerate(shapes)
        ]
        self.inverse = InverseDynamics(width, action_dim, params["inv_hidden"])
        self.iql = IQL(width, action_dim, hidden_dim=params["iql_hidden"], discount=self.args["discount"])
        self.saved: dict[str, dict[str, np.ndarray]] = {}
        self.ours: Outputs = {}

    # ---------- what the stages share ----------

    def tape(self, stage: str) -> NoiseTape:
        """A stage's draws without those of the networks' initial frequencies."""
        end = self.golden.meta["text"]["draw_range"][stage][1]
        return NoiseTape([draw for _, draw in self.golden.draws[loop_start(self.golden, stage) : end]])

    def initial(self) -> list[LevelTrainer]:
        """Levels with the recorded initial weights and new optimizers."""
        weights = self.golden.weights
        for i, level in enumerate(self.levels):
            prefix = f"diffusion{i}."
            own = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
            load_level(self.golden.name, level, own)
        return [LevelTrainer(level, RATE, self.args["ema_rate"]) for level in self.levels]

    def load(self, name: str, step: str = "latest") -> None:
        """Weights of the levels that an earlier stage saved."""
        for i, level in enumerate(self.levels):
            load_level(self.golden.name, level, self.saved[f"{name}{i}_{step}"])

    def options(self, stage: str, steps: int) -> dict[str, Any]:
        printed = [ast.literal_eval(line) for line in self.golden.meta["text"]["printed"][stage] if line[0] == "{"]

        def record(row: dict[str, Any]) -> None:
            expected = printed.pop(0)
            if row.keys() != expected.keys() or not np.allclose(list(row.values()), list(expected.values()), 1e-4):
                raise Mismatch(f"{self.golden.name}: {stage} prints {expected}, ours {row}")

        return {"steps": steps, "log_interval": 2, "save_interval": 3, "record": record}

    def source(self) -> PlanSource:
        values = None
        if self.kind != "mujoco":
            values = self.iql.V(tf.constant(self.data.states)).numpy()[:, 0]
        scale = return_scale(self.args["task"]["env_name"])
        told = [conditions(self.data, i, scale, values) for i in range(len(self.levels))]
        rows = [self.data.rows(i, stride=stride) for i, stride in enumerate(self.strides)]
        return PlanSource(self.data.states, self.data.actions, rows, told, tf.float32)

    def level_outputs(self, stage: str, everything: bool) -> None:
        names = self.golden.meta["text"]["sumnorm_rows"]
        for i, level in enumerate(self.levels):
            found = both(level)
            flat = [found[k].astype(np.float64) for k in names]
            self.ours[f"{stage}.diffusion{i}.sumnorm"] = np.array([[v.sum(), np.sqrt((v * v).sum())] for v in flat])
        kept = {k: v for k, v in found.items() if everything or k.startswith("model_ema.")}
        self.ours |= {f"{stage}.diffusion{len(self.levels) - 1}.{k}": v for k, v in kept.items()}

    # ---------- the stages ----------

    def iql_training(self, stage: str, over: dict[str, Any]) -> None:
        td = self.golden.subgroup("td")
        state = self.data_normalizer(td["observations"])
        rewards = td["rewards"] / np.float32(4) if self.kind == "kitchen" else td["rewards"] - np.float32(1)
        columns = [state.normalize(td["observations"]), td["actions"], rewards[:, None]]
        columns += [state.normalize(td["next_observations"]), td["terminals"].astype(np.float32)[:, None]]
        drawn = self.golden.draws[loop_start(self.golden, stage) :]
        permutations = [draw for name, draw in drawn if name == "torch.randperm"]
        tape = NoiseTape(permutations[0 : 2 * IQL_DRAWS : 2])
        weights = self.golden.weights
        builder.load(self.golden.name, self.iql, {k[4:]: v for k, v in weights.items() if k.startswith("iql.")})
        steps = self.params["iql_steps"]
        options = self.options(stage, 1000000) | {"run_dir": Saving(self.save_iql)}
        loop = QLearning(IQLTrainer(self.iql), [c.astype(np.float32) for c in columns], tape, batch_size=256, **options)
        loop.run(until=steps)
        self.ours |= {f"{stage}.iql.{k}": v for k, v in state_dict(self.iql).items()}
        load_state_dict(self.iql, self.saved["iql"])

    def data_normalizer(self, observations: np.ndarray) -> Any:
        return type(self.data.normalizer).fit(observations)

    def save_iql(self, step: int) -> None:
        self.saved["iql"] = {k: v.copy() for k, v in state_dict(self.iql).items()}

    def training(self, stage: str, over: dict[str, Any]) -> None:
        trainers, inverse = self.initial(), InverseTrainer(self.inverse)
        weights = {k[7:]: v for k, v in self.golden.weights.items() if k.startswith("invdyn.")}
        builder.load(self.golden.name, self.inverse, weights)
        trainer, steps = LiteTrainer(trainers, inverse, self.source()), self.args["diffusion_gradient_steps"]

        def save(step: int) -> None:
            for i, level in enumerate(self.levels):
                self.saved[f"diffusion{i}_latest"] = self.saved[f"diffusion{i}_{step}"] = both(level)
            if step <= self.args["invdyn_gradient_steps"]:
                self.saved["invdyn"] = state_dict(self.inverse)

        options = self.options(stage, steps) | {
            "run_dir": Saving(save),
            "rate": RATE,
            "batch_size": self.args["batch_size"],
        }
        invdyn_steps = self.args["invdyn_gradient_steps"]
        loop = PlanTraining(trainer, self.data, self.tape(stage), invdyn_steps=invdyn_steps, **options)
        loop.observed = []
        loop.run(until=steps + 1)
        order = self.golden.arrays[f"in/draw_{loop_start(self.golden, stage):03d}"]
        size, source = self.args["batch_size"], trainer.source

        def told(number: int, level: int) -> np.ndarray:
            windows = self.data.at(order[number * size : (number + 1) * size])
            return source.plans(level, windows[level])[1].numpy()

        self.losses(stage, loop, [cosine_rate(RATE, i, steps) for i in range(steps + 1)], told)
        self.ours[f"{stage}.losses.invdyn"] = np.array([row[3] for row in loop.observed if len(row) == 4])
        self.level_outputs(stage, everything=True)
        self.ours |= {f"{stage}.invdyn.{k.removeprefix('model.')}": v for k, v in state_dict(self.inverse).items()}

    def losses(self, stage: str, loop: LiteLoop, rates: list[float], told: Callable[[int, int], np.ndarray]) -> None:
        """Of every update: losses, learning rates, and the returns that `told` gives for (update, level)."""
        count = len(self.levels)
        self.ours[f"{stage}.lr"] = np.repeat(rates, count)
        for i in range(count):
            self.ours[f"{stage}.losses.diffusion{i}"] = np.array([row[i] for row in loop.observed])
            self.ours[f"{stage}.cond.diffusion{i}"] = np.stack([told(number, i) for number in range(len(rates))])

    def prepare_dataset(self, stage: str, over: dict[str, Any]) -> None:
        self.initial()
        self.load("diffusion")
        sizes = self.args["cond_dataset_size"], self.args["uncond_dataset_size"]
        for i, level in enumerate(self.levels):
            for kind, size in zip(("cond", "uncond"), sizes, strict=True):
                self.ours[f"{stage}.traj_{kind}_dataset_{i}"] = np.zeros((size, 2, *level.shape), np.float32)
            self.ours[f"{stage}.condition_dataset_{i}"] = np.zeros((sizes[0], 1), np.float32)

        def write(level: int, first: int, pairs: np.ndarray, returns: np.ndarray | None) -> None:
            kind = "uncond" if returns is None else "cond"
            self.ours[f"{stage}.traj_{kind}_dataset_{level}"][first : first + len(pairs)] = pairs
            if returns is not None:
                self.ours[f"{stage}.condition_dataset_{level}"][first : first + len(pairs)] = returns

        batch, steps = self.args["dataset_prepare_batch_size"], self.args["dataset_prepare_sampling_steps"]
        said: list[str] = []
        Generation(self.levels, self.data, self.source().plans, batch, steps).run(
            self.tape(stage), *sizes, write, said.append
        )
        if said != self.golden.meta["text"]["printed"][stage][-len(said) :]:
            raise Mismatch(f"{self.golden.name}: {stage} says {said}")

    def reflow(self, stage: str, over: dict[str, Any]) -> None:
        trainers = self.initial()
        self.load("diffusion")
        # from the recorded pairs: ours differ by rounding
        out, levels = self.golden.group("out"), range(len(self.levels))
        names = ("traj_cond_dataset", "condition_dataset", "traj_uncond_dataset")
        pairs = Pairs(*([out[f"prepare.{name}_{i}"] for i in levels] for name in names))
        steps = self.args["reflow_gradient_steps"]

        def save(step: int) -> None:
            self.saved |= {f"reflow{i}_latest": both(level) for i, level in enumerate(self.levels)}

        options = self.options(stage, steps) | {
            "run_dir": Saving(save),
            "rate": RATE,
            "batch_size": self.args["batch_size"],
        }
        loop = Reflow(ReflowTrainer(trainers), pairs, self.tape(stage), **options)
        loop.observed = []
        loop.run()
        drawn = [draw for name, draw in self.golden.draws[loop_start(self.golden, stage) :] if name == "torch.randint"]

        def told(number: int, level: int) -> np.ndarray:
            rows = drawn[number * len(self.levels) + level]
            unconditional = number % 5 == 0
            return np.full((len(rows), 1), np.nan) if unconditional else pairs.returns[level][rows]

        self.losses(stage, loop, [RATE] * steps, told)
        self.level_outputs(stage, everything=False)

    def inference(self, stage: str, over: dict[str, Any]) -> None:
        task, model = self.args["task"], over.get("test_model", "R1")
        self.load(
            "reflow" if model == "R2" else "diffusion",
            "latest" if model == "R2" else task.get("diffusion_ckpt", "latest"),
        )
        load_state_dict(self.inverse, self.saved["invdyn"])
        options: dict[str, Any] = {"temperature": self.args["temperature"], "steps": 1 if model == "R2" else 3}
        name = task["env_name"]
        if self.kind == "mujoco":
            options["guidance"] = (task[f"w_cfg_{model}"],) * 3
        else:
            options |= {"steps": 2 if model == "R2" else 5, "candidates": self.args["num_candidates"]}
            options |= {"judged": -1} if self.kind == "kitchen" else {"judged": 1, "guidance": (1.0, 0.0, 0.0)}

        def targets(observations: np.ndarray, returns: np.ndarray) -> np.ndarray:
            if self.kind == "kitchen":
                return kitchen_targets(name, returns)
            if self.kind == "antmaze":
                return antmaze_targets(name, observations, upstream_typo=True)
            return np.full(len(observations), task[f"target_return_{model}"], np.float32)

        fitted = self.data.normalizer.arrays
        planner = DiffuserLite(
            self.levels, self.inverse, fitted["means"], fitted["stds"], Acting(**options), self.iql.V
        )
        answers = Answers(self.golden, 1 if model == "R2" else 0)
        found = run_lite_episodes(planner, answers, self.tape(stage), targets, limit=5, published=self.kind)
        self.ours[f"{stage}.actions"] = np.stack(answers.actions)
        scores = np.minimum(found.published, DOMAINS[self.kind].best_return)[None] / 100
        said = f"{np.mean(scores, -1)} {np.std(scores, -1)}"
        if said != self.golden.meta["text"]["printed"][stage][-1]:
            raise Mismatch(
                f"{self.golden.name}: {stage} ends with {self.golden.meta['text']['printed'][stage]}, ours {said}"
            )


def loop_start(golden: Golden, stage: str) -> int:
    """Number of a stage's first draw after those of the networks' initial frequencies."""
    return golden.meta["text"]["draw_range"][stage][0] + 3


def replay(golden: Golden) -> None:
    """Every stage."""
    pipeline = Pipeline(golden)
    for stage, over in golden.meta["params"]["stages"]:
        getattr(pipeline, over["mode"])(stage, over)
    comparison = Comparison(golden.name, 7, "float32")
    for name, value in golden.group("out").items():
        if name not in pipeline.ours:
            raise Mismatch(f"{golden.name}: ours gives no output {name!r}")
        check(comparison, name, pipeline.ours[name], value, 14 * RATE, quantity="DiffuserLite's pipelines")
