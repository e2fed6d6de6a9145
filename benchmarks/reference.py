"""The PyTorch side: a checkout of the authors' DPPO, or this repository's PyTorch twins. Run by benchmarks/run.py.

Nothing of the reference is copied: its classes are imported from the checkout and called as its agents call them.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workloads as w
from worker import Unavailable, Workload, serve
from workloads import ACTOR, CRITIC, PPO, SHAPES

LOG_PROB_BATCH = 10_000
VALUE_COEFFICIENT = 0.5


class Upstream:
    """Workloads made of the authors' classes.

    Args:
        arguments: `upstream`, the checkout; `data`, a folder with `train.npz` and `normalization.npz`.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.data = arguments.data
        sys.path.insert(0, str(arguments.upstream))

    @functools.cached_property
    def policy(self) -> Any:
        from model.common.critic import CriticObs
        from model.diffusion.diffusion_ppo import PPODiffusion
        from model.diffusion.mlp_diffusion import DiffusionMLP

        return PPODiffusion(actor=DiffusionMLP(**ACTOR), critic=CriticObs(**CRITIC), **SHAPES, **PPO)

    def sampling(self) -> Workload:
        state = torch.from_numpy(w.rollout().state[: w.ENVS])

        def call() -> None:
            with torch.no_grad():
                sample = self.policy(cond={"state": state}, deterministic=False, return_chain=True)
            sample.trajectories.numpy(), sample.chains.numpy()

        return call

    def _passes(self, r: w.Rollout) -> np.ndarray:
        """Values and log-probabilities of a rollout in batches; the log-probabilities [N,F,H,A]."""
        out = np.empty((0, w.FINE_TUNED, w.HORIZON, w.ACTION))
        with torch.no_grad():
            for i in range(0, w.SAMPLES, LOG_PROB_BATCH):
                cond = {"state": torch.from_numpy(r.state[i : i + LOG_PROB_BATCH])}
                self.policy.critic(cond).numpy()
                part = self.policy.get_logprobs(cond, torch.from_numpy(r.chains[i : i + LOG_PROB_BATCH]))
                out = np.vstack((out, part.numpy().reshape(-1, *out.shape[1:])))
        return out

    def log_probs(self) -> Workload:
        r = w.rollout()
        return lambda: self._passes(r)

    def minibatch(self) -> Workload:
        r, model = w.rollout(), self.policy
        data = [torch.from_numpy(v) for v in r]
        state, chains, returns, old_values, advantages = data
        old = torch.tensor(self._passes(r)).float()
        actor = torch.optim.AdamW(model.actor_ft.parameters(), lr=1e-4, weight_decay=0)
        critic = torch.optim.AdamW(model.critic.parameters(), lr=1e-3, weight_decay=0)
        rows = _Rows(lambda: torch.randperm(w.SAMPLES * w.FINE_TUNED))

        def call() -> None:
            sample, step = torch.unravel_index(rows.take(w.MINIBATCH), (w.SAMPLES, w.FINE_TUNED))
            pg_loss, _, v_loss, *_ = model.loss(
                {"state": state[sample]},
                chains[sample, step],
                chains[sample, step + 1],
                step,
                returns[sample],
                old_values[sample],
                advantages[sample],
                old[sample, step],
                reward_horizon=w.HORIZON,
            )
            actor.zero_grad()
            critic.zero_grad()
            (pg_loss + VALUE_COEFFICIENT * v_loss).backward()
            actor.step()
            critic.step()

        return call

    def pretraining(self) -> Workload:
        from agent.dataset.sequence import StitchedSequenceDataset
        from model.diffusion.diffusion import DiffusionModel
        from model.diffusion.mlp_diffusion import DiffusionMLP

        path = f"{self.data}/train.npz"
        dataset = StitchedSequenceDataset(path, horizon_steps=w.HORIZON, cond_steps=1, device="cpu")
        return _pretraining(DiffusionModel(DiffusionMLP(**ACTOR), **SHAPES), dataset, lambda m, b: m.loss(*b))

    def environments(self) -> Workload:
        try:
            from env.gym_utils import make_async
            from omegaconf import OmegaConf

            chunks = {"n_obs_steps": 1, "n_action_steps": w.HORIZON, "max_episode_steps": 1000}
            wrappers = OmegaConf.create(
                {
                    "mujoco_locomotion_lowdim": {"normalization_path": f"{self.data}/normalization.npz"},
                    "multi_step": chunks | {"reset_within_step": True},
                }
            )
            venv = make_async(
                "hopper-medium-v2", num_envs=w.ENVS, wrappers=wrappers, obs_dim=w.OBSERVATION, action_dim=w.ACTION
            )
        except ImportError as error:
            raise Unavailable(f"needs the old simulators, see --upstream-python ({error})") from error
        venv.seed(list(range(w.ENVS)))
        venv.reset_arg([{} for _ in range(w.ENVS)])
        actions, turn = w.actions(), {"i": 0}

        def call() -> None:
            venv.step(actions[turn["i"] % len(actions)])
            turn["i"] += 1

        return call


class _Rows:
    """Consecutive parts of a shuffled order, drawn anew when it is used up."""

    def __init__(self, shuffle: Callable[[], torch.Tensor]):
        self.shuffle, self.left = shuffle, shuffle()

    def take(self, count: int) -> torch.Tensor:
        if len(self.left) < count:
            self.left = self.shuffle()
        taken, self.left = self.left[:count], self.left[count:]
        return taken


def _pretraining(model: Any, dataset: Any, loss_of: Callable[[Any, Any], torch.Tensor]) -> Workload:
    """Ten steps of supervised training as the reference's agent makes them: loader, AdamW, average every tenth."""
    import copy

    loader = torch.utils.data.DataLoader(dataset, batch_size=w.PRETRAIN_BATCH, shuffle=True)
    average, batches = copy.deepcopy(model), {"now": iter(loader)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-6)

    def next_batch() -> Any:
        batch = next(batches["now"], None)
        if batch is None or len(batch[0]) < w.PRETRAIN_BATCH:
            batches["now"] = iter(loader)
            batch = next(batches["now"])
        return batch

    def call() -> None:
        for _ in range(w.PRETRAIN_STEPS):
            loss = loss_of(model, next_batch())
            loss.backward()
            loss.item()
            optimizer.step()
            optimizer.zero_grad()
        for new, old in zip(model.parameters(), average.parameters(), strict=True):
            old.data = 0.995 * old.data + 0.005 * new.data

    return call


def multiply(m: int, k: int, n: int) -> Workload:
    a, b = torch.randn(m, k), torch.randn(k, n)
    return lambda: a @ b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", type=Path, help="the authors' checkout; without it, our twins")
    parser.add_argument("--data", type=Path, help="folder with train.npz and normalization.npz")
    parser.add_argument("--algorithms", type=Path, help="file of resolved configurations")
    arguments = parser.parse_args()
    if arguments.upstream:
        side: Any = Upstream(arguments)
    else:
        from twins import Twins

        side = Twins()
    names = ("sampling", "log_probs", "minibatch", "pretraining", "environments")
    makers = {n: getattr(side, n) for n in names if hasattr(side, n)}
    if arguments.upstream:
        import reference_networks

        makers |= reference_networks.makers()
    if arguments.upstream and arguments.algorithms:
        import reference_algorithms

        makers |= reference_algorithms.makers(json.loads(arguments.algorithms.read_text()))
    serve(makers, multiply, torch.set_num_threads, ["torch"])


if __name__ == "__main__":
    main()
