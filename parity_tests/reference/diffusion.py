"""Diffusion policies and DPPO's loss, in torch: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), DPPO (Ren et al. 2024).

A policy is (spec, weights, tables): the recorded specification, the state_dict, the schedule.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity_tests.reference import forward, networks
from parity_tests.reference.networks import Weights, below

# Observations [B,To,O], or {"state", "rgb"} and what "draw"s shifts and masks where images are augmented.
State = Tensor | dict[str, Any]


def ddpm_tables(steps: int) -> dict[str, Tensor]:
    """The cosine schedule and what follows from it, in float32."""
    grid = np.linspace(0, 1, steps + 1)
    abar = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = abar / abar[0]
    betas = torch.tensor(np.clip(1 - abar[1:] / abar[:-1], 0, 0.999), dtype=torch.float32)
    alphas = 1 - betas
    abar = torch.cumprod(alphas, 0)
    before = torch.cat([torch.ones(1), abar[:-1]])
    var = betas * (1 - before) / (1 - abar)
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "ddpm_var": var,
        "ddpm_logvar_clipped": var.clamp(min=1e-20).log(),
        "ddpm_mu_coef1": betas * before.sqrt() / (1 - abar),
        "ddpm_mu_coef2": (1 - before) * alphas.sqrt() / (1 - abar),
    }


def ddim_tables(ddpm: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Tables of the visited steps, noisiest first."""
    abar = ddpm["alphas_cumprod"]
    t = torch.arange(steps) * (len(abar) // steps)
    tables = {
        "ddim_t": t,
        "ddim_alphas": abar[t],
        "ddim_alphas_sqrt": abar[t].sqrt(),
        "ddim_alphas_prev": torch.cat([torch.ones(1), abar[t[:-1]]]),
        "ddim_sqrt_one_minus_alphas": (1 - abar[t]) ** 0.5,
        "ddim_sigmas": torch.zeros(steps),
    }
    return {k: v.flip(0) for k, v in tables.items()}


class Policy:
    """A pre-trained or fine-tuned diffusion policy.

    Args:
        spec: {"class", "kwargs"} as recorded; `network` or `actor`, and optionally `critic` and `eta`, inside.
        weights: state_dict, tensors of one precision.
        tables: schedule tables of that precision (made from the spec if left out).
    """

    def __init__(self, spec: dict[str, Any], weights: Weights, tables: dict[str, Tensor] | None = None):
        self.kwargs = {"denoising_steps": 100, "denoised_clip_value": 1.0, "randn_clip_value": 10} | spec["kwargs"]
        self.weights = weights
        self.network = self.kwargs.get("actor") or self.kwargs["network"]
        self.dtype = next(iter(weights.values())).dtype
        self.ddim = bool(self.kwargs.get("use_ddim"))
        steps = int(self.kwargs["denoising_steps"])
        if tables is None:
            tables = ddpm_tables(steps)
            if self.ddim:
                tables |= ddim_tables(tables, self.kwargs["ddim_steps"])
        self.tables = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in tables.items()}
        # (t, position) of each sampling step, noisiest first
        self.timesteps = self.tables["ddim_t"] if self.ddim else torch.arange(steps).flip(0)
        self.steps = len(self.timesteps)
        self.tuned = int(self.kwargs.get("ft_denoising_steps", 0))

    def get(self, name: str, default: Any = None) -> Any:
        return self.kwargs.get(name, default)

    def at(self, name: str, rows: Tensor) -> Tensor:
        return self.tables[name][rows].view(-1, 1, 1)

    def output(self, which: str, x: Tensor, t: Tensor, state: State) -> Tensor:
        cond = state if isinstance(state, dict) else {"state": state}
        draw, arguments = cond.get("draw", networks.nothing_drawn), {"x": x, "time": t, "cond": cond}
        return forward.outputs(self.network, below(self.weights, which), arguments, draw)[0]

    def eta(self, state: State) -> Tensor:
        spec, state = self.kwargs["eta"], state["state"] if isinstance(state, dict) else state
        value = networks.eta(spec["class"].rsplit(".", 1)[-1], below(self.weights, "eta"), spec["kwargs"], state)
        return (value if self.get("learn_eta") else value.detach())[:, None]

    def moments(
        self, x: Tensor, position: Tensor, state: State, which: str, eta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (before floors) of the next sample. `eta` None: DDIM's noise is zero."""
        t = self.timesteps[position]
        out = self.output(which, x, t, state)
        bound = self.get("denoised_clip_value")
        if not self.ddim:
            x0 = out
            if self.get("predict_epsilon", True):
                x0 = self.at("sqrt_recip_alphas_cumprod", t) * x - self.at("sqrt_recipm1_alphas_cumprod", t) * out
            if bound is not None:
                x0 = x0.clamp(-bound, bound)
            mean = self.at("ddpm_mu_coef1", t) * x0 + self.at("ddpm_mu_coef2", t) * x
            return mean, torch.exp(0.5 * self.at("ddpm_logvar_clipped", t))
        alpha, before = self.at("ddim_alphas", position), self.at("ddim_alphas_prev", position)
        root = self.at("ddim_sqrt_one_minus_alphas", position)
        eps, x0 = out, (x - root * out) / alpha.sqrt()
        if bound is not None:
            x0 = x0.clamp(-bound, bound)
            eps = (x - alpha.sqrt() * x0) / root
        if self.get("eps_clip_value") is not None:
            eps = eps.clamp(-self.get("eps_clip_value"), self.get("eps_clip_value"))
        if eta is None:
            return before.sqrt() * x0 + (1 - before).sqrt() * eps, torch.zeros_like(alpha)
        sigma = (eta * ((1 - before) / (1 - alpha) * (1 - alpha / before)).sqrt()).clamp(min=1e-10)
        direction = (1 - before - sigma * sigma).clamp(min=0).sqrt()
        return before.sqrt() * x0 + direction * eps, sigma

    def sample(
        self, state: State, noise: Tensor, deterministic: bool, base: bool = False, evaluation: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(chunks, chain of the fine-tuned steps). `evaluation` is the rule of pre-trained policies and evaluators."""
        quiet = deterministic or evaluation
        floor = 1e-3 if quiet else float(self.get("min_sampling_denoising_std", 0.1))
        x, first = noise[0], self.steps - self.tuned
        chain = [x] if first == 0 else []
        for i in range(self.steps):
            position = torch.full((len(x),), i)
            which = "actor_ft" if i >= first and not base else "network"
            eta = None
            if self.ddim:
                eta = torch.zeros(len(x), 1, 1, dtype=x.dtype) if quiet else self.eta(state)
            mean, std = self.moments(x, position, state, which, eta)
            std = std.clamp(min=floor)
            if quiet and (self.ddim or self.timesteps[i] == 0):
                std = torch.zeros_like(std)
            bound = self.get("randn_clip_value")
            x = mean + std * noise[i + 1].clamp(-bound, bound)
            last = self.get("final_action_clip_value")
            if last is not None and i == self.steps - 1:
                x = x.clamp(-last, last)
            if i >= first - 1:
                chain.append(x)
        return x, torch.stack(chain, 1)

    def step_log_probs(
        self, state: State, before: Tensor, after: Tensor, inds: Tensor, base: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-density of single fine-tuned steps, per element, and eta."""
        position = inds + self.steps - self.tuned
        eta = self.eta(state) if self.ddim else None
        mean, std = self.moments(before, position, state, "network" if base else "actor_ft", eta)
        std = std.clamp(min=self.get("min_logprob_denoising_std", 0.1))
        log_prob = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(after)
        return log_prob, torch.ones_like(mean) if eta is None else eta

    def chain_log_probs(self, state: State, chains: Tensor, base: bool = False) -> tuple[Tensor, Tensor]:
        """The same for whole chains [B,F+1,H,A], rows sample by sample."""
        batch = len(chains)
        inds = torch.arange(self.tuned).repeat(batch)
        rows = _repeated(state, self.tuned)
        return self.step_log_probs(rows, chains[:, :-1].flatten(0, 1), chains[:, 1:].flatten(0, 1), inds, base)

    def noisy(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.at("sqrt_alphas_cumprod", t) * x + self.at("sqrt_one_minus_alphas_cumprod", t) * noise

    def supervised_loss(self, x: Tensor, state: State, t: Tensor, noise: Tensor) -> Tensor:
        target = noise if self.get("predict_epsilon", True) else x
        return (self.output("network", self.noisy(x, t, noise), t, state) - target).square().mean()

    def value(self, state: State) -> Tensor:
        arguments = {"cond": state if isinstance(state, dict) else {"state": state}}
        weights = below(self.weights, "critic")
        return forward.outputs(self.kwargs["critic"], weights, arguments, networks.nothing_drawn)[0][:, 0]

    def reinforce_loss(self, state: State, chains: Tensor, reward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_prob, eta = self.chain_log_probs(state, chains)
        per_sample = log_prob.sum(-1).view(len(reward), -1).mean(1)
        advantage = (reward - self.value(state)).detach()
        return -(per_sample * advantage).mean(), (self.value(state) - reward).square().mean(), eta

    def ppo_loss(
        self,
        obs: State,
        chains_prev: Tensor,
        chains_next: Tensor,
        denoising_inds: Tensor,
        returns: Tensor,
        oldvalues: Tensor,
        advantages: Tensor,
        oldlogprobs: State,
        reward_horizon: int = 4,
        bc_noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """DPPO's loss (eqs. 4.1 to 4.3) and what is logged beside it."""

        def mean_log_prob(log_prob: Tensor, horizon: int) -> Tensor:
            return log_prob.clamp(-5, 2)[:, :horizon].mean((1, 2))

        log_prob, eta = self.step_log_probs(obs, chains_prev, chains_next, denoising_inds)
        log_ratio = mean_log_prob(log_prob, reward_horizon) - mean_log_prob(oldlogprobs, reward_horizon)
        ratio = log_ratio.exp()
        adv = advantages
        if self.get("norm_adv", True):
            adv = (adv - adv.mean()) / (adv.std() + 1e-8)
        low = torch.quantile(adv, self.get("clip_advantage_lower_quantile", 0))
        high = torch.quantile(adv, self.get("clip_advantage_upper_quantile", 1))
        to_come = self.tuned - 1 - denoising_inds
        adv = adv.clamp(low, high) * self.get("gamma_denoising") ** to_come.to(self.dtype)
        base, top = self.get("clip_ploss_coef_base", 1e-3), self.get("clip_ploss_coef")
        rate = self.get("clip_ploss_coef_rate", 3)
        progress = denoising_inds.to(self.dtype) / (self.tuned - 1)
        reach = base + (top - base) * torch.expm1(rate * progress) / math.expm1(rate)
        clipped = torch.minimum(torch.maximum(ratio, 1 - reach), 1 + reach)
        values = self.value(obs)
        error = (values - returns).square()
        if self.get("clip_vloss_coef") is not None:
            bound = self.get("clip_vloss_coef")
            error = torch.maximum(error, (oldvalues + (values - oldvalues).clamp(-bound, bound) - returns).square())
        bc = torch.zeros((), dtype=self.dtype)
        if bc_noise is not None:
            chain = self.sample(obs, bc_noise, deterministic=False, base=True)[1].detach()
            bc = -mean_log_prob(self.chain_log_probs(obs, chain)[0], chain.shape[2]).mean()
        return {
            "pg_loss": torch.maximum(-adv * ratio, -adv * clipped).mean(),
            "entropy_loss": -eta.mean(),
            "v_loss": 0.5 * error.mean(),
            "clipfrac": ((ratio - 1).abs() > reach).to(self.dtype).mean(),
            "approx_kl": (ratio - 1 - log_ratio).mean().detach(),
            "ratio": ratio.mean().detach(),
            "bc_loss": bc,
            "eta": eta.mean().detach(),
        }


def _repeated(state: State, times: int) -> State:
    if isinstance(state, dict):
        return {k: v.repeat_interleave(times, 0) for k, v in state.items()}
    return state.repeat_interleave(times, 0)
