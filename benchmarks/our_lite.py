"""Our side of the rows of lite.py. Run by benchmarks/run.py."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import lite  # noqa: E402
import numpy as np  # noqa: E402
from worker import Workload, serve  # noqa: E402

from diffusion_rl.core.noise import NoiseSource, initial_weights  # noqa: E402
from diffusion_rl.core.threads import configure_threads  # noqa: E402
from diffusion_rl.data.plan_windows import PlanDataset, conditions  # noqa: E402
from diffusion_rl.methods.diffuser_lite.levels import Acting, PlanLevel, level_shapes  # noqa: E402
from diffusion_rl.methods.diffuser_lite.planner import DiffuserLite  # noqa: E402
from diffusion_rl.methods.diffuser_lite.trainer import (  # noqa: E402
    InverseTrainer,
    LevelTrainer,
    LiteTrainer,
    PlanSource,
)
from diffusion_rl.methods.diffuser_lite.training import PlanTraining  # noqa: E402
from diffusion_rl.networks.dit import ConditionalDiT  # noqa: E402
from diffusion_rl.networks.inverse_dynamics import InverseDynamics  # noqa: E402

EPISODES, RATE = 10, 2e-4


@functools.cache
def parts() -> tuple[list[PlanLevel], InverseDynamics]:
    width = lite.OBSERVATION
    with initial_weights(NoiseSource(0)):
        levels = [
            PlanLevel(ConditionalDiT(width, **lite.NETWORK), states, width, i == 0, lite.WEIGHT)
            for i, states in enumerate(lite.STATES)
        ]
        return levels, InverseDynamics(width, lite.ACTION)


def decision(name: str) -> Workload:
    each, noise, fitted = lite.DECISIONS[name], NoiseSource(0), lite.observations(1000)
    acting = Acting(lite.STEPS[each.model], lite.TEMPERATURE, (each.guidance,) * len(lite.STATES))
    planner = DiffuserLite(*parts(), fitted.mean(0), fitted.std(0), acting, runtime="tflite")
    raw, targets = lite.observations(each.n_envs), np.ones(each.n_envs, np.float32)
    return lambda: planner.act(raw, targets, planner.draw(noise, each.n_envs))


def update() -> Workload:
    """As the training makes them: windows and noise drawn, states gathered."""
    noise, rows = NoiseSource(0), 1000 * EPISODES
    flat = {
        "observations": lite.observations(rows),
        "actions": np.zeros((rows, lite.ACTION), np.float32),
        "rewards": np.ones(rows, np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(1, rows + 1) % 1000 == 0,
    }
    shapes = level_shapes(lite.STATES)
    data = PlanDataset(flat, "mujoco", [shape.span for shape in shapes], 0.997, None)
    windows = [data.rows(i, stride=shape.stride) for i, shape in enumerate(shapes)]
    told = [conditions(data, i, 1000.0, None) for i in range(len(shapes))]
    levels, inverse = parts()
    trainers = [LevelTrainer(level, RATE, 0.9999) for level in levels]
    source = PlanSource(data.states, data.actions, windows, told, levels[0].dtype)
    loop = PlanTraining(
        LiteTrainer(trainers, InverseTrainer(inverse), source),
        data,
        noise,
        batch_size=lite.BATCH,
        rate=RATE,
        invdyn_steps=10**6,
        steps=10**6,
        log_interval=10**6,
        save_interval=10**6,
    )
    return lambda: loop.updates(lite.AT_ONCE)


def makers() -> dict[str, Any]:
    """By the names of the rows."""
    return {name: functools.partial(decision, name) for name in lite.DECISIONS} | {lite.TRAINING: update}


if __name__ == "__main__":
    from ours import multiply

    configure_threads()  # as in training; decisions have threads of their own

    serve(makers(), multiply, packages=["tensorflow"])
