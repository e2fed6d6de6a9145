"""DPOER: its estimates of the entropy, the published loss by hand, the temperature, and a gradient that is one."""

import math

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.methods.on_policy.dpoer import DPOER, DPOERTrainer
from diffusion_rl.networks.critics import CriticObs
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.mlp import DiffusionMLP
from diffusion_rl.policies.entropy import mixture_entropy, nearest_neighbour_entropy

A, H, OBS, K, F = 2, 3, 4, 5, 3
RATE = 1e-2
SCHEDULE = {"first_cycle_steps": 10, "warmup_steps": 0, "min_lr": RATE}


def make_policy(**options):
    with precision("float64"), initial_weights(NoiseSource(3)):
        return DPOER(
            gamma_denoising=0.9,
            clip_ploss_coef=0.02,
            clip_ploss_coef_base=0.01,
            actor=DiffusionMLP(A, H, OBS, 16, [16] * 3, residual_style=True),
            critic=CriticObs(OBS, [16] * 3, activation_type="Mish", residual_style=True),
            **{"horizon_steps": H, "obs_dim": OBS, "action_dim": A, "denoising_steps": K, "ft_denoising_steps": F},
            **options,
        )


def make_trainer(fast=True, **options):
    train = {f"{k}_{s}": v for k in ("actor", "critic") for s, v in (("lr", RATE), ("weight_decay", 0.0))}
    train |= {f"{k}_lr_scheduler": SCHEDULE for k in ("actor", "critic")} | {"vf_coef": 0.5, "fast": fast}
    return DPOERTrainer(make_policy(**options), train, H)


def load(trainer, n=8):
    draw = NoiseSource(7)
    state, noise = draw.normal((n, 1, OBS), np.float64), draw.normal((K + 1, n, H, A), np.float64)
    decision = trainer.actor.act(state, noise, deterministic=False)
    rest = [draw.normal((n,), np.float64) for _ in range(3)]
    return trainer.load(state, decision.chains, *rest, decision.log_probs), draw


# --- estimates


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_nearest_neighbours_find_a_gaussians_entropy(dimension):
    samples = 0.7 * NoiseSource(1).normal((8, 400, dimension), np.float64)
    true = dimension * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.7))
    found = nearest_neighbour_entropy(tf.constant(samples))
    assert float(tf.reduce_mean(found)) == pytest.approx(true, abs=0.1 * dimension)
    # scaling by s adds D log s
    np.testing.assert_allclose(nearest_neighbour_entropy(tf.constant(samples * 3)) - found, dimension * math.log(3))


def test_mixtures_of_separate_clusters():
    """Weights 1/2, 1/4, 1/4 and known covariances: the sum of the formula, but for sampling."""
    noise = NoiseSource(2).normal((400, 2), np.float64)
    centres = np.repeat([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]], [200, 100, 100], axis=0)
    points = (centres + noise)[None]
    parts = [np.cov(noise[a:b].T, bias=True) + 1e-6 * np.eye(2) for a, b in ((0, 200), (200, 300), (300, 400))]
    weights = np.array([0.5, 0.25, 0.25])
    gaussians = [0.5 * (2 * (1 + math.log(2 * math.pi)) + np.linalg.slogdet(c)[1]) for c in parts]
    expected = np.sum(weights * gaussians) - np.sum(weights * np.log(weights))
    np.testing.assert_allclose(mixture_entropy(tf.constant(points)), [expected], rtol=1e-9)
    both = tf.constant(np.concatenate([points, 2 * points]))
    np.testing.assert_allclose(np.diff(mixture_entropy(both)), 2 * math.log(2), atol=1e-5)


def test_a_mixture_on_four_points_hardly_sees_their_spread():
    """What is known of the published estimate: covariances collapse to their floor, 1e-6 (see dpoer.py)."""
    points = NoiseSource(3).normal((300, 4, 3), np.float64)
    narrow, wide = (float(tf.reduce_mean(mixture_entropy(tf.constant(s * points)))) for s in (0.1, 1.0))
    assert -14 < narrow < wide < -11.5 and wide - narrow < 3  # the true difference is 3 log 10 = 6.9 per point


# --- the published form


def test_published_loss_by_hand():
    policy = make_policy(lambda_alpha_entropy=2.0)
    draw = NoiseSource(4)
    log_prob, old, advantages = (draw.normal((6,), np.float64) for _ in range(3))
    steps = np.array([0, 1, 2, 0, 1, 2])
    loss, ratio, _, _ = policy.step_policy_loss(*map(tf.constant, (log_prob, old, advantages, steps)))
    bound = 0.01 + 0.01 * (np.exp(3 * steps / (F - 1)) - 1) / (math.exp(3) - 1)
    r = np.exp(log_prob - old)
    unclipped = -advantages * r + 0.272 / 2 * log_prob
    np.testing.assert_allclose(loss, np.maximum(unclipped, -advantages * np.clip(r, 1 - bound, 1 + bound)), rtol=1e-12)
    np.testing.assert_allclose(ratio, r)


def test_temperature_follows_the_estimate_also_while_the_critic_warms_up():
    with precision("float64"):
        trainer = make_trainer(entropy_refresh_interval=2, target_entropy=0.0, entropy_rows=5)
        n_rows, draw = load(trainer)
        drawn = []
        for number in range(4):
            draws = trainer.draw(draw, n_rows)
            drawn.append(None if draws is None else draws.shape)
            trainer.minibatch(draw.permutation(n_rows), False, number, draws)
    assert drawn == [(5, H, A), None, (5, H, A), None]
    seen = trainer.watched()
    assert seen["entropy"] < 0  # collapsed: below any target that counts all dimensions
    assert seen["temperature"] == pytest.approx(0.272 + 4 * 3e-4, rel=1e-4)  # Adam: a step of its rate each


def test_bounds_of_the_published_estimate():
    with precision("float64"):
        trainer = make_trainer(entropy_bounds=[2, 0.5], target_entropy=-1.0)
        n_rows, draw = load(trainer)
        trainer.minibatch(draw.permutation(n_rows), True, 0, trainer.draw(draw, n_rows))
    assert trainer.watched()["entropy"] == -2.0


@pytest.mark.parametrize("mode", ["published", "corrected"])
def test_fast_equals_plain(mode):
    results = []
    for fast in (True, False):
        with precision("float64"):
            trainer = make_trainer(fast, mode=mode, lambda_alpha_entropy=1.0, entropy_states=2)
            n_rows, draw = load(trainer)
            for number in range(2):
                trainer.minibatch(draw.permutation(n_rows)[:12], True, number, trainer.draw(draw, 12))
        assert trainer.restructured == fast
        results.append([*(v.numpy() for v in trainer.trained["actor"]), *trainer.watched().values()])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


# --- the corrected form


def test_gradient_of_the_action_entropy_is_its_derivative():
    """Autodiff through the chain against central differences along a random direction, with the same noise."""
    policy, draw = make_policy(mode="corrected"), NoiseSource(5)
    obs = {"state": tf.constant(draw.normal((2, 1, OBS), np.float64))}
    noise = tf.constant(draw.normal((K + 1, 2 * 32, H, A), np.float64))
    weights = variables_of(policy.actor_ft)
    with tf.GradientTape() as tape:
        entropy = policy.action_entropy(obs, noise, tf.constant(0.1, tf.float64))
    grads = tape.gradient(entropy, weights)
    direction = [draw.normal(w.shape, np.float64) for w in weights]
    slope = sum(float(tf.reduce_sum(g * d)) for g, d in zip(grads, direction, strict=True) if g is not None)

    def moved(step):
        for w, d in zip(weights, direction, strict=True):
            w.assign_add(step * d)
        return float(policy.action_entropy(obs, noise, tf.constant(0.1, tf.float64)))

    step = 1e-6
    up, down = moved(step), moved(-2 * step)
    assert slope == pytest.approx((up - down) / (2 * step), rel=1e-4) and abs(slope) > 1e-3


def test_a_strong_term_raises_the_entropy_and_the_temperature_stays_positive():
    with precision("float64"):
        trainer = make_trainer(mode="corrected", lambda_alpha_entropy=1e-2, target_entropy=100.0, entropy_states=4)
        n_rows, draw = load(trainer)
        seen = []
        for number in range(40):
            trainer.minibatch(draw.permutation(n_rows), True, number, trainer.draw(draw, n_rows))
            seen.append(trainer.watched())
    entropies = [s["entropy"] for s in seen]
    assert np.mean(entropies[-5:]) > np.mean(entropies[:5]) + 0.5
    assert seen[-1]["temperature"] > seen[0]["temperature"] > 0.272  # the target is out of reach


def test_what_does_not_fit_is_said_in_one_line():
    with pytest.raises(UserError, match="model.mode=fixed: take published or corrected"):
        make_policy(mode="fixed")
    with pytest.raises(UserError, match="must be equal with model.mode=published"):
        make_policy(min_sampling_denoising_std=0.2)
    with pytest.raises(UserError, match="give at least 32"):
        make_policy(mode="corrected", entropy_samples=8)
