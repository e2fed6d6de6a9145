"""The PyTorch side without a checkout: workloads made of this repository's own twins (parity_tests/reference).

They compute what the reference computes but leave out its detours (the frozen actor on fine-tuned rows, Python loops),
so ratios against them are smaller than those against the reference.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import workloads as w  # noqa: E402
from parity_tests.reference.diffusion import Policy  # noqa: E402
from worker import Workload  # noqa: E402
from workloads import ACTOR, CRITIC, PPO, SHAPES  # noqa: E402


def here(array: Any) -> torch.Tensor:
    """An array [...] as a tensor on PyTorch's default device."""
    return torch.from_numpy(array).to(torch.get_default_device())


def _linear(weights: dict[str, torch.Tensor], name: str, inputs: int, outputs: int) -> None:
    layer = torch.nn.Linear(inputs, outputs)
    weights[f"{name}.weight"], weights[f"{name}.bias"] = layer.weight.detach(), layer.bias.detach()


def _residual(weights: dict[str, torch.Tensor], name: str, inputs: int, width: int, outputs: int) -> None:
    _linear(weights, f"{name}.layers.0", inputs, width)
    for part in ("l1", "l2"):
        _linear(weights, f"{name}.layers.1.{part}", width, width)
    _linear(weights, f"{name}.layers.2", width, outputs)


class Twins:
    """As `reference.Upstream`; no environments, no loader."""

    @functools.cached_property
    def policy(self) -> Any:
        weights: dict[str, torch.Tensor] = {}
        for actor in ("network", "actor_ft"):
            _linear(weights, f"{actor}.time_embedding.1", w.TIME, 2 * w.TIME)
            _linear(weights, f"{actor}.time_embedding.3", 2 * w.TIME, w.TIME)
            inputs = w.HORIZON * w.ACTION + w.TIME + w.OBSERVATION
            _residual(weights, f"{actor}.mlp_mean", inputs, w.ACTOR_WIDTH, w.HORIZON * w.ACTION)
        _residual(weights, "critic.Q1", w.OBSERVATION, w.CRITIC_WIDTH, 1)
        actor = {"class": "model.diffusion.mlp_diffusion.DiffusionMLP", "kwargs": ACTOR}
        critic = {"class": "model.common.critic.CriticObs", "kwargs": CRITIC}
        kwargs = SHAPES | PPO | {"actor": actor, "critic": critic}
        return Policy({"class": "PPODiffusion", "kwargs": kwargs}, weights)

    def sampling(self, envs: int = w.ENVS) -> Workload:
        state = here(w.rollout().state[:envs])

        def call() -> None:
            noise = torch.randn(w.DENOISING + 1, envs, w.HORIZON, w.ACTION)
            with torch.no_grad():
                self.policy.sample(state, noise, deterministic=False)

        return call

    def log_probs(self) -> Workload:
        r = w.rollout()

        def call() -> None:
            with torch.no_grad():
                for part in torch.arange(w.SAMPLES, device="cpu").split(10_000):
                    state = here(r.state[part])
                    self.policy.value(state)
                    self.policy.chain_log_probs(state, here(r.chains[part]))

        return call

    def minibatch(self, samples: int = w.SAMPLES, count: int = w.MINIBATCH) -> Workload:
        r = [here(v) for v in w.rollout(samples=samples)]
        state, chains, returns, values, advantages = r
        weights = self.policy.weights
        groups = [[v for k, v in weights.items() if k.startswith(name)] for name in ("actor_ft", "critic")]
        for tensor in sum(groups, []):
            tensor.requires_grad_()
        optimizers = [torch.optim.AdamW(g, lr=lr, weight_decay=0) for g, lr in zip(groups, (1e-4, 1e-3), strict=True)]
        old = torch.full((count, w.HORIZON, w.ACTION), 0.9)

        def call() -> None:
            rows = torch.randperm(samples * w.FINE_TUNED)[:count]
            sample, step = torch.unravel_index(rows, (samples, w.FINE_TUNED))
            links = chains[sample, step], chains[sample, step + 1]
            scalars = returns[sample], values[sample], advantages[sample]
            losses = self.policy.ppo_loss(state[sample], *links, step, *scalars, old)
            for optimizer in optimizers:
                optimizer.zero_grad()
            (losses["pg_loss"] + 0.5 * losses["v_loss"]).backward()
            for optimizer in optimizers:
                optimizer.step()

        return call
