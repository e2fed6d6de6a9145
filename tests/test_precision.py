"""Half precision: backward products in bfloat16, forward passes as they were."""

import logging

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.core import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.methods.on_policy.dppo import DPPO, DPPOTrainer
from diffusion_rl.networks.critics import CriticObs
from diffusion_rl.networks.mlp import DiffusionMLP

pytestmark = pytest.mark.usefixtures("halves")
SETTINGS = {
    **{"actor_lr": 1e-4, "critic_lr": 1e-3, "actor_weight_decay": 0, "critic_weight_decay": 0, "vf_coef": 0.5},
    **{"batch_size": 2000, "update_epochs": 1, "gamma": 0.99},
    **{
        f"{who}_lr_scheduler": {"first_cycle_steps": 100, "warmup_steps": 1, "min_lr": 1e-4}
        for who in ("actor", "critic")
    },
}


@pytest.fixture
def halves(monkeypatch):
    monkeypatch.setattr(precision, "has_half_products", lambda: True)


def test_only_gradients_are_rounded():
    draws = NoiseSource(0)
    x, kernel = (tf.constant(draws.normal(shape), tf.float32) for shape in ((200, 160), (160, 128)))

    @tf.function
    def both(how):
        with precision.backward_in(how), tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = precision.product(x, kernel)
            value = tf.reduce_sum(tf.sin(y))
        return y, tape.gradient(value, [x, kernel])

    (y, plain), (same, halved) = both("float32"), both("bfloat16")
    np.testing.assert_array_equal(y, same)
    for a, b in zip(plain, halved, strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert 1e-4 < error < 5e-3


@pytest.mark.parametrize("fast", [True, False])
def test_losses_of_a_minibatch_are_equal_and_gradients_near(fast):
    losses, grads = zip(*(_minibatch(how, fast) for how in ("float32", "bfloat16")), strict=True)
    for name in losses[0]:
        np.testing.assert_array_equal(losses[0][name], losses[1][name], err_msg=name)
    plain, halved = (np.concatenate([g.numpy().ravel() for g in both["actor"]]) for both in grads)
    cosine = plain @ halved / np.linalg.norm(plain) / np.linalg.norm(halved)
    assert not np.array_equal(plain, halved)
    assert cosine > 0.9999


def test_a_processor_without_them_computes_as_before_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(precision, "has_half_products", lambda: False)
    precision._say_without.cache_clear()
    with caplog.at_level(logging.WARNING):
        (_, plain), (_, same) = (_minibatch(how, True) for how in ("float32", "bfloat16"))
    assert "no bfloat16 products" in caplog.text
    for a, b in zip(plain["actor"], same["actor"], strict=True):
        np.testing.assert_array_equal(a, b)


def _minibatch(how, fast):
    """Losses and gradients of one minibatch of a small DPPO policy."""
    n, horizon, action, obs = 400, 4, 3, 11
    with initial_weights(NoiseSource(1)):
        actor = DiffusionMLP(action, horizon, obs, time_dim=16, mlp_dims=[128, 128, 128], residual_style=True)
        critic = CriticObs(obs, [32, 32, 32], residual_style=True)
    policy = DPPO(
        actor=actor,
        critic=critic,
        horizon_steps=horizon,
        obs_dim=obs,
        action_dim=action,
        denoising_steps=20,
        ft_denoising_steps=5,
        gamma_denoising=0.99,
        clip_ploss_coef=0.01,
        clip_ploss_coef_base=0.001,
    )
    trainer = DPPOTrainer(policy, SETTINGS | {"fast": fast, "precision": how}, horizon)
    draws = NoiseSource(2)
    arrays = (
        draws.normal(shape).astype(np.float32) for shape in ((n, 1, obs), (n, 6, horizon, action), (n,), (n,), (n,))
    )
    state, chains, returns, values, advantages = arrays
    log_probs = trainer.actor.log_probs(state, chains * 0.1)
    trainer.load(state, chains * 0.1, returns, values, advantages, log_probs)

    @tf.function
    def gradients(rows):
        with precision.backward_in(how):
            return trainer.gradients(rows, trainer.data, None)

    return gradients(tf.range(2000))
