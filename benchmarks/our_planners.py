"""Our side of the rows of planners.py. Run by benchmarks/run.py."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402
import planners as p  # noqa: E402
from worker import Workload, serve  # noqa: E402

from diffusion_rl.core.noise import NoiseSource, initial_weights  # noqa: E402
from diffusion_rl.core.threads import configure_threads  # noqa: E402
from diffusion_rl.data.episodes import Episodes  # noqa: E402
from diffusion_rl.data.trajectories import TrajectoryDataset  # noqa: E402
from diffusion_rl.diffusion.guidance import Guide  # noqa: E402
from diffusion_rl.methods.diffuser.model import Diffuser, TrajectoryDiffusion, ValueDiffusion  # noqa: E402
from diffusion_rl.methods.diffuser.trainer import DiffuserTrainer  # noqa: E402
from diffusion_rl.networks.temporal_unet import TemporalUnet, ValueFunction  # noqa: E402


def models(case: p.Case) -> tuple[TrajectoryDiffusion, ValueDiffusion]:
    sizes: Any = (case.horizon, case.observation_dim, case.action_dim, p.DENOISING)
    with initial_weights(NoiseSource(0)):
        unet = TemporalUnet(case.horizon, case.transition_dim, dim_mults=case.dim_mults, attention=case.attention)
        value = ValueFunction(case.horizon, case.transition_dim, dim_mults=case.dim_mults)
    return (
        TrajectoryDiffusion(unet, *sizes, "l2", predict_epsilon=False, action_weight=10),
        ValueDiffusion(value, *sizes, "value_l2", predict_epsilon=False),
    )


def dataset(case: p.Case, discount: float | None) -> TrajectoryDataset:
    count, length = 10, 200
    episodes = Episodes(
        p.numbers(count * length, case.observation_dim),
        p.numbers(count * length, case.action_dim),
        np.full(count, length),
        p.numbers(count * length),
        np.zeros(count * length, bool),
    )
    return TrajectoryDataset(episodes, case.horizon, "GaussianNormalizer", length, discount=discount)


def decision(name: str, guided: bool) -> Workload:
    case = p.CASES[name]
    diffusion, value = models(case)
    guide = Guide(value.value, case.scale, p.GUIDE_STEPS, case.t_stopgrad) if guided else None
    planner = Diffuser(diffusion, dataset(case, None).normalizers, guide, p.SAMPLES)
    noise, observation = NoiseSource(0), {0: p.numbers(1, case.observation_dim)}
    return lambda: planner.act(observation, planner.draw(noise, 1))


def training(name: str, of_value: bool) -> Workload:
    case, rng = p.CASES[name], np.random.default_rng(0)
    data = dataset(case, 0.99 if of_value else None)
    model = models(case)[of_value]
    trainer = DiffuserTrainer(model, data, 2e-4, 0.995)
    size = p.BATCH * p.MICRO_BATCHES

    def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        noise = rng.standard_normal((size, case.horizon, case.transition_dim), np.float32)
        return rng.integers(0, len(data), size), rng.integers(0, p.DENOISING, size), noise

    return lambda: trainer.steps([batch() for _ in range(p.TRAINING_STEPS)], 1)


def makers() -> dict[str, Any]:
    """By the names of the rows."""
    found: dict[str, Any] = {}
    for name in p.CASES:
        found |= {f"{name} {kind}": functools.partial(decision, name, kind == "guided") for kind in p.KINDS[:2]}
        found |= {f"{name} {kind}": functools.partial(training, name, kind != "training") for kind in p.KINDS[2:]}
    return found


if __name__ == "__main__":
    from ours import multiply

    configure_threads()

    serve(makers(), multiply, packages=["tensorflow"])
