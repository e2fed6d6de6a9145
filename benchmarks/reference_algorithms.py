"""The PyTorch side of the rows of algorithms.py: the authors' losses, called as their agents call them."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

import algorithms as a
import numpy as np
import torch
from reference_networks import build
from worker import Workload

BATCH = ("obs", "next_obs", "actions", "rewards", "terminated")


class Learner:
    """An algorithm of the reference with its optimizers and a full buffer; one method for each kind of update."""

    def __init__(self, description: dict[str, Any]):
        self.cfg, self.train = description, description["train"]
        self.model = build(description["model"])
        self.arrays = a.experience(description)
        self.deques = {name: deque(rows) for name, rows in self.arrays.items() if name in BATCH}
        self.size = self.train["batch_size"]
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    # ---------- rows ----------

    def rows(self, n: int, names: tuple[str, ...] = BATCH, at: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Of arrays, as where many updates follow each other."""
        at = np.random.choice(a.ROWS, n) if at is None else at
        return {name: torch.from_numpy(self.arrays[name][at]).float() for name in names}

    def rows_of_deques(self, n: int) -> dict[str, torch.Tensor]:
        """One by one, as where an iteration is a step."""
        at = np.random.choice(a.ROWS, n)
        return {name: torch.from_numpy(np.array([rows[i] for i in at])).float() for name, rows in self.deques.items()}

    def halves(self, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([first[name], second[name]]) for name in first}

    # ---------- steps ----------

    def step(self, name: str, parameters: Any, loss: torch.Tensor) -> None:
        """One step of the optimizer of that name; AdamW, or Adam without its settings of a schedule."""
        parameters = list(parameters)
        if name not in self.optimizers:
            rate = self.train.get(f"{name}_lr", self.train.get("lr", 3e-4))
            kind = torch.optim.AdamW if f"{name}_weight_decay" in self.train or "weight_decay" in self.train else None
            self.optimizers[name] = (kind or torch.optim.Adam)(parameters, lr=rate)
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()

    def bellman(self, b: dict[str, torch.Tensor], parameters: Any, *further: Any, loss_of: str = "loss_critic") -> None:
        loss = getattr(self.model, loss_of)(
            {"state": b["obs"]},
            {"state": b["next_obs"]},
            b["actions"],
            b["rewards"],
            b["terminated"],
            self.train["gamma"],
            *further,
        )
        self.step("critic", parameters, loss)

    # ---------- algorithms: one call is `updates` of them ----------

    def rwr(self) -> None:
        b = self.rows(self.size, ("obs", "actions", "weights"))
        loss = self.model.loss(b["actions"], {"state": b["obs"]}, b["weights"])
        self.step("actor", self.model.parameters(), loss)

    def awr(self) -> None:
        if self.count % a.CRITIC_SHARE == 0:
            b = self.rows(self.size, ("obs", "returns"))
            self.step(
                "critic", self.model.critic.parameters(), self.model.loss_critic({"state": b["obs"]}, b["returns"])
            )
        b = self.rows(self.size, ("obs", "actions", "advantages"))
        advantages = (b["advantages"] - b["advantages"].mean()) / (b["advantages"].std() + 1e-6)
        weights = torch.exp(self.train["beta"] * advantages).clamp(max=self.train["max_adv_weight"])
        self.step("actor", self.model.actor.parameters(), self.model.loss(b["actions"], {"state": b["obs"]}, weights))

    def dipo(self) -> None:
        self.bellman(self.rows(self.size), self.model.critic.parameters())
        at = np.random.choice(a.ROWS, self.size)
        b = self.rows(self.size, ("obs", "actions"), at)
        actions = b["actions"].reshape(self.size, -1)
        climb = torch.optim.Adam([actions], lr=self.train["action_lr"], eps=1e-5)
        for _ in range(self.train["action_gradient_steps"]):
            actions.requires_grad_(True)
            climb.zero_grad()
            (-torch.min(*self.model.critic({"state": b["obs"]}, actions)).sum()).backward()
            torch.nn.utils.clip_grad_norm_([actions], 0.1 * actions.shape[1])
            climb.step()
            actions.requires_grad_(False)
            actions.clamp_(-1.0, 1.0)
        better = actions.reshape(b["actions"].shape)
        self.arrays["actions"][at] = better.numpy()
        self.step("actor", self.model.actor.parameters(), self.model.loss(better, {"state": b["obs"]}))
        self.model.update_target_critic(self.train["target_ema_rate"])
        self.model.update_target_actor(self.train["target_ema_rate"])

    def idql(self) -> None:
        b = self.rows(self.size)
        value = self.model.loss_critic_v({"state": b["obs"]}, b["actions"])
        self.step("critic_v", self.model.critic_v.parameters(), value)
        self.bellman(b, self.model.critic_q.parameters(), loss_of="loss_critic_q")
        self.model.update_target_critic(self.train["critic_tau"])
        self.step("actor", self.model.actor.parameters(), self.model.loss(b["actions"], {"state": b["obs"]}))

    def dql(self) -> None:
        b = self.rows(self.size)
        self.bellman(b, self.model.critic.parameters())
        loss = self.model.loss_actor({"state": b["obs"]}, self.train["eta"], self.cfg["act_steps"])
        self.step("actor", self.model.actor.parameters(), loss)
        self.model.update_target_critic(self.train["target_ema_rate"])

    def qsm(self) -> None:
        b = self.rows(self.size)
        self.bellman(b, self.model.critic_q.parameters())
        loss = self.model.loss_actor({"state": b["obs"]}, b["actions"], self.train["q_grad_coeff"])
        self.step("actor", self.model.actor.parameters(), loss)
        self.model.update_target_critic(self.train["critic_tau"])

    @functools.cached_property
    def log_alpha(self) -> torch.Tensor:
        return torch.zeros(1, requires_grad=True)

    def temper(self, b: dict[str, torch.Tensor]) -> None:
        entropy = self.train["target_entropy"]
        loss = self.model.loss_temperature({"state": b["obs"]}, self.log_alpha.exp(), entropy)
        self.step("alpha", [self.log_alpha], loss)

    def improve(self, b: dict[str, torch.Tensor], *further: Any) -> None:
        self.step("actor", self.model.network.parameters(), self.model.loss_actor({"state": b["obs"]}, *further))

    def sac(self) -> None:
        b, alpha = self.rows_of_deques(self.size), self.log_alpha.exp().item()
        self.bellman(b, self.model.critic.parameters(), alpha)
        self.model.update_target_critic(self.train["target_ema_rate"])
        for _ in range(2):
            self.improve(b, alpha)
            self.temper(b)

    def rlpd(self) -> None:
        b, alpha, half = {}, self.log_alpha.exp().item(), self.size // 2
        for _ in range(self.train["critic_num_update"]):
            b = self.halves(self.rows(half), self.rows_of_deques(half))
            self.bellman(b, self.model.ensemble_params.values(), alpha)
            self.model.update_target_critic(self.train["target_ema_rate"])
        self.improve(b, alpha)
        self.temper(b)

    def calql(self) -> None:
        half, cfg = self.size // 2, self.cfg
        b = self.halves(self.rows(half, (*BATCH, "returns")), self.rows(half, (*BATCH, "returns")))
        shape = (self.size, self.train["n_random_actions"], cfg["horizon_steps"], cfg["action_dim"])
        loss = self.model.loss_critic(
            {"state": b["obs"]},
            {"state": b["next_obs"]},
            b["actions"],
            torch.rand(shape) * 2 - 1,
            b["rewards"],
            b["returns"],
            b["terminated"],
            self.train["gamma"],
        )
        self.step("critic", self.model.critic.parameters(), loss)
        self.model.update_target_critic(self.train["target_ema_rate"])
        self.improve(b, self.log_alpha.exp().item())
        self.temper(b)

    def ibrl(self) -> None:
        b = {}
        for _ in range(self.train["critic_num_update"]):
            b = self.rows_of_deques(self.size)
            self.bellman(b, self.model.ensemble_params.values())
            self.model.update_target_critic(self.train["target_ema_rate"])
        self.improve(b)
        self.model.update_target_actor(self.train["target_ema_rate"])

    count = 0  # of updates of DAWR's actor


def updates(descriptions: dict[str, Any], name: str) -> Workload:
    learner = Learner(descriptions[name])

    def call() -> None:
        for _ in range(a.CASES[name].updates):
            getattr(learner, name)()
            learner.count += 1

    return call


def makers(descriptions: dict[str, Any]) -> dict[str, Any]:
    """By the names of the rows."""
    return {row: functools.partial(updates, descriptions, row.partition(" ")[0]) for row in a.rows()}
