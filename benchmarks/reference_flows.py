"""The PyTorch side of the rows of flows.py: a checkout of the authors' ReinFlow, called as its agent calls it.

Run by benchmarks/run.py.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import flows
import torch
from worker import Workload, serve

SWITCHES = {"normalize_denoising_horizon": True, "normalize_act_space_dimension": True}


class Reference:
    """Policies with new weights, by their number of steps."""

    def __init__(self, checkout: Path):
        sys.path.insert(0, str(checkout))
        self.policies: dict[int, Any] = {}

    def policy(self, steps: int) -> Any:
        from model.common.critic import CriticObs
        from model.flow.ft_ppo.ppoflow import PPOFlow
        from model.flow.mlp_flow import FlowMLP

        if steps not in self.policies:
            network = FlowMLP(flows.HORIZON, flows.ACTION, flows.OBSERVATION, **flows.VELOCITY)
            critic = CriticObs(cond_dim=flows.OBSERVATION, **flows.CRITIC)
            unused = {"clip_ploss_coef_base": 0.01, "clip_ploss_coef_rate": 3, "actor_policy_path": None}
            unused |= {"logprob_debug_sample": False, "logprob_debug_recalculate": False}
            arguments = {"device": "cpu", "policy": network, "critic": critic, **flows.policy(steps), **unused}
            self.policies[steps] = PPOFlow(**arguments)
        return self.policies[steps]

    def decision(self, name: str) -> Workload:
        each = flows.DECISIONS[name]
        policy, state = self.policy(each.steps), flows.observations(each.n_envs)

        def call() -> Any:
            cond = {"state": torch.tensor(state)}
            drawn = policy.get_actions(cond, eval_mode=False, save_chains=True, **SWITCHES)
            return [part.numpy() for part in drawn]

        return call

    def minibatch(self) -> Workload:
        policy = self.policy(4)
        rates = ((policy.actor_ft, 4.5e-5), (policy.critic, 6.5e-4))
        optimizers = [torch.optim.AdamW(part.parameters(), lr=lr, weight_decay=0) for part, lr in rates]
        data = {name: torch.from_numpy(value) for name, value in flows.rollout(4).items()}
        names = ("chains", "returns", "values", "advantages", "old_log_prob")
        rows = torch.from_numpy(flows.minibatch() // 10)

        def call() -> None:
            columns = (data[name][rows] for name in names)
            pg_loss, entropy, v_loss, *_ = policy.loss(
                {"state": data["state"][rows]}, *columns, verbose=False, **SWITCHES
            )
            for optimizer in optimizers:
                optimizer.zero_grad()
            (pg_loss + 0.03 * entropy + 0.5 * v_loss).backward()
            for optimizer in optimizers:
                optimizer.step()

        return call

    def makers(self) -> dict[str, Any]:
        """By the names of the rows."""
        decisions = {name: functools.partial(self.decision, name) for name in flows.DECISIONS}
        return decisions | {flows.MINIBATCH: self.minibatch}


if __name__ == "__main__":
    from reference import multiply

    serve(Reference(Path(sys.argv[1])).makers(), multiply, torch.set_num_threads, packages=["torch"])
