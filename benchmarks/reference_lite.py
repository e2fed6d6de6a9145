"""The PyTorch side of the rows of lite.py: a checkout of the authors' DiffuserLite, called as their script calls it.

Run by benchmarks/run.py.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import lite
import numpy as np
import torch
from worker import Workload, serve

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parity_tests.surroundings import make_cleandiffuser_importable  # noqa: E402


class Reference:
    """The models of all levels with new weights."""

    def __init__(self, checkout: Path):
        make_cleandiffuser_importable(str(checkout))
        from cleandiffuser.diffusion import ContinuousRectifiedFlow
        from cleandiffuser.invdynamic import FancyMlpInvDynamic
        from cleandiffuser.nn_condition import MLPCondition
        from cleandiffuser.nn_diffusion import DiT1d
        from cleandiffuser.utils import GaussianNormalizer

        width, emb_dim = lite.OBSERVATION, lite.NETWORK["emb_dim"]
        self.levels = []
        for i, states in enumerate(lite.STATES):
            mask, weights = torch.zeros((states, width)), torch.ones((states, width))
            mask[0 if i == 0 else [0, -1]] = 1.0
            weights[1] = lite.WEIGHT
            network = DiT1d(width, timestep_emb_type="fourier", **lite.NETWORK)
            condition = MLPCondition(1, emb_dim, hidden_dims=[emb_dim])
            self.levels.append(
                ContinuousRectifiedFlow(network, condition, mask, weights, ema_rate=0.9999, device="cpu")
            )
        self.inverse = FancyMlpInvDynamic(width, lite.ACTION, 256, torch.nn.Tanh(), add_dropout=True, device="cpu")
        self.normalizer = GaussianNormalizer(lite.observations(1000))

    def decision(self, name: str) -> Workload:
        each = lite.DECISIONS[name]
        for part in (*self.levels, self.inverse):
            part.eval()
        priors = [torch.zeros((each.n_envs, states, lite.OBSERVATION)) for states in lite.STATES]
        condition, raw = torch.ones((each.n_envs, 1)), lite.observations(each.n_envs)

        def call() -> np.ndarray:
            state = torch.tensor(self.normalizer.normalize(raw), dtype=torch.float32)
            priors[0][:, 0] = state
            for i, level in enumerate(self.levels):
                plan, _ = level.sample(
                    priors[i],
                    n_samples=each.n_envs,
                    sample_steps=lite.STEPS[each.model],
                    use_ema=True,
                    condition_cfg=condition,
                    w_cfg=each.guidance,
                    temperature=lite.TEMPERATURE,
                    sample_step_schedule="quad_continuous",
                )
                if i + 1 < len(self.levels):
                    priors[i + 1][:, [0, -1]] = plan[:, [0, 1]]
            with torch.no_grad():
                return self.inverse(plan[:, 0], plan[:, 1]).cpu().numpy()

        return call

    def update(self) -> Workload:
        for part in (*self.levels, self.inverse):
            part.train()
        plans = [torch.from_numpy(each) for each in lite.plans()]
        returns, actions = torch.ones((lite.BATCH, 1)), torch.zeros((lite.BATCH, lite.STATES[-1], lite.ACTION))

        def call() -> None:
            for _ in range(lite.AT_ONCE):
                for level, states in zip(self.levels, plans, strict=True):
                    level.update(states, returns)
                self.inverse.update(plans[-1][:, :-1], actions[:, :-1], plans[-1][:, 1:])

        return call


def makers(checkout: Path) -> dict[str, Any]:
    """By the names of the rows."""
    side = functools.cache(lambda: Reference(checkout))
    found = {name: functools.partial(lambda name: side().decision(name), name) for name in lite.DECISIONS}
    return found | {lite.TRAINING: lambda: side().update()}


if __name__ == "__main__":
    from reference import multiply

    serve(makers(Path(sys.argv[1])), multiply, torch.set_num_threads, ["torch"])
