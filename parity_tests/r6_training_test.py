"""Rung 6: a hundred training steps on the same batches and noise, in float64: losses on the way, weights at the end."""

from __future__ import annotations

import pytest
import tensorflow as tf

from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.core.optimizers import AdamW, clip_by_global_norm
from diffusion_rl.interop import torch_names
from diffusion_rl.networks.layers import variables_of
from parity_tests import drawn
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

as_torch = torch.from_numpy
STEPS = 100
SIZE = {"action_dim": 3, "horizon_steps": 4, "obs_dim": 5, "cond_steps": 1}
NETWORK = drawn.spec(
    drawn.NETWORK, action_dim=3, horizon_steps=4, cond_dim=5, mlp_dims=[16, 16, 16], residual_style=True
)
CRITIC = drawn.spec(drawn.CRITIC, cond_dim=5, mlp_dims=[16, 16, 16], residual_style=True)
COMMON = {"action_dim": 3, "horizon_steps": 4, "obs_dim": 5}


@pytest.mark.parametrize("predict_epsilon", [True, False])
def test_pretraining(predict_epsilon):
    specification = drawn.spec(
        drawn.PRETRAINED, network=NETWORK, denoising_steps=20, predict_epsilon=predict_epsilon, **COMMON
    )
    model, draws = drawn.build_drawn(specification, 1, "float64"), drawn.Draws(2)
    twin = drawn.twin_of(model, specification)
    optimizer = AdamW(variables_of(model), 1e-3, 1e-2)
    twin_optimizer = torch.optim.AdamW(list(twin.weights.values()), lr=1e-3, weight_decay=1e-2)
    schedule = CosineWarmupRestarts(30, max_lr=3e-3, min_lr=1e-4, warmup_steps=5)

    @tf.function
    def train(x, state, t, noise):
        with tf.GradientTape() as tape:
            loss = model.loss(x, {"state": state}, t, noise)
        optimizer.apply(tape.gradient(loss, optimizer.variables))
        return loss

    comparison = Comparison("100 steps of pre-training", 6, "float64")
    for _ in range(STEPS):
        x, state, noise = draws.chunk(SIZE, 16), draws.state(SIZE, 16), draws.chunk(SIZE, 16)
        t = draws.integers(20, 16)
        optimizer.learning_rate.assign(schedule.lr)
        twin_optimizer.param_groups[0]["lr"] = schedule.lr
        loss = twin.supervised_loss(*map(as_torch, (x, state, t, noise)))
        twin_optimizer.zero_grad()
        loss.backward()
        twin_optimizer.step()
        comparison.check("loss", train(x, state, t, noise), loss.detach())
        schedule.step()
    for name, value in torch_names.state_dict(model).items():
        comparison.check(name, value, twin.weights[name].detach(), quantity="weights")


@pytest.mark.parametrize(
    "options",
    [
        {"denoising_steps": 8, "ft_denoising_steps": 4, "clip_vloss_coef": 0.2},
        {
            "denoising_steps": 20,
            "ft_denoising_steps": 3,
            "use_ddim": True,
            "ddim_steps": 5,
            "eta": drawn.spec(drawn.ETA + "EtaAction", action_dim=3, base_eta=0.7),
            "learn_eta": True,
        },
    ],
    ids=["ddpm", "ddim, eta learned"],
)
def test_fine_tuning(options):
    specification = drawn.spec(
        drawn.PPO, actor=NETWORK, critic=CRITIC, gamma_denoising=0.99, clip_ploss_coef=0.1, **COMMON, **options
    )
    model, draws = drawn.build_drawn(specification, 3, "float64"), drawn.Draws(4)
    twin = drawn.twin_of(model, specification)
    for name, tensor in twin.weights.items():
        tensor.requires_grad_(not name.startswith(("network.", "actor.")))
    parts = ["actor_ft", "critic"] + (["eta"] if model.learn_eta else [])
    ours = {p: AdamW(variables_of(getattr(model, p)), 3e-3, 1e-3) for p in parts}
    theirs = {
        p: torch.optim.AdamW([w for n, w in twin.weights.items() if n.startswith(p + ".")], lr=3e-3, weight_decay=1e-3)
        for p in parts
    }
    batches = [drawn.ppo_batch(model, draws, SIZE, 24) for _ in range(5)]

    @tf.function
    def train(state, *rest):
        with tf.GradientTape(persistent=True) as tape:
            loss = model.loss({"state": state}, *rest)
            total = loss["pg_loss"] + 0.01 * loss["entropy_loss"] + 0.5 * loss["v_loss"]
        for part, optimizer in ours.items():
            grads = tape.gradient(total, optimizer.variables)
            optimizer.apply(clip_by_global_norm(grads, 0.5)[0] if part == "actor_ft" else grads)
        return total

    comparison = Comparison("100 steps of DPPO", 6, "float64")
    for step in range(STEPS):
        batch = batches[step % len(batches)].values()
        loss = twin.ppo_loss(*map(as_torch, batch))
        total = loss["pg_loss"] + 0.01 * loss["entropy_loss"] + 0.5 * loss["v_loss"]
        for optimizer in theirs.values():
            optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(theirs["actor_ft"].param_groups[0]["params"], 0.5)
        for optimizer in theirs.values():
            optimizer.step()
        comparison.check("loss", train(*batch), total.detach(), scale=1.0)
    for name, value in torch_names.state_dict(model).items():
        comparison.check(name, value, twin.weights[name].detach(), quantity="weights")
