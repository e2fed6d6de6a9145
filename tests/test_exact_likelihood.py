"""The likelihood along the probability-flow ODE: integrators, a flow solved by hand, the two forms of the update."""

import math

import numpy as np
import pytest
import tensorflow as tf
from tests.small_runs import eagerly

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.diffusion.exact_likelihood import METHODS, VPSDE, integrate, time_grid
from diffusion_rl.methods.on_policy import dppo_exact
from diffusion_rl.methods.on_policy.dppo_exact import ExactDPPO, ExactDPPOTrainer
from diffusion_rl.networks.critics import CriticObs
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.mlp import DiffusionMLP

A, H, OBS, K, F = 2, 3, 4, 5, 2
SCHEDULE = {"first_cycle_steps": 10, "warmup_steps": 0, "min_lr": 1e-3}


def make_policy(seed=3, **options):
    options = {"sde_num_epsilon": 2, "sde_step_size": 0.2} | options
    with precision("float64"), initial_weights(NoiseSource(seed)):
        policy = ExactDPPO(
            sde=VPSDE(K),
            sde_min_beta=1e-10,
            sde_probability_flow=True,
            clip_ploss_coef=0.1,
            actor=DiffusionMLP(A, H, OBS, 16, [16] * 3, residual_style=True),
            critic=CriticObs(OBS, [16] * 3, activation_type="Mish", residual_style=True),
            **{"horizon_steps": H, "obs_dim": OBS, "action_dim": A, "denoising_steps": K, "ft_denoising_steps": F},
            **options,
        )
    noise = NoiseSource(4)
    for variable in variables_of(policy.actor_ft):
        variable.assign_add(0.05 * noise.normal(variable.shape, np.float64))
    return policy


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("rk4", 4)])
def test_integrators_converge_with_their_order(method, order):
    """dy/dt = t y has the solution y(1) = y(t0) exp((1 - t0^2) / 2)."""
    start, errors = 0.1, []
    for step in (0.1, 0.05):
        (y,) = integrate(lambda t, s: [t * s[0]], [tf.constant(1.0, tf.float64)], time_grid(start, step), method)
        errors.append(abs(float(y) - math.exp((1 - start**2) / 2)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)
    assert set(METHODS) == {"euler", "midpoint", "heun2", "rk4"}


def test_time_ends_at_one_with_what_is_left():
    grid = time_grid(1e-4, 0.25)
    assert grid == [1e-4, 0.2501, 0.5001, 0.7501, 1.0]
    assert len(time_grid(1e-4, 0.05)) == 21


class Shrinking(tf.Module):
    """A "network" that says the noise is x times 0.3, so that every step of the flow is a scaling."""

    def __call__(self, x, t, cond):
        return 0.3 * x


def test_a_linear_flow_by_hand():
    """x_{i+1} = x_i (1 + dt v_i) with v_i = beta_i (0.3 / std_i - 1) / 2; its divergence is 6 v_i for 6 elements."""
    policy = make_policy()
    policy.actor = policy.actor_ft = Shrinking()
    grid, tables = policy.time_grid, policy.sde.tables(policy.schedule, 1e-10)
    scale, gained = 1.0, 0.0
    for t0, t1 in zip(grid, grid[1:], strict=False):
        i = round(t0 * K)
        v = 0.5 * float(tables.betas[i]) * (0.3 / float(tables.sqrt_one_minus_alphas_cumprod[i]) - 1)
        gained += (t1 - t0) * v * H * A
        scale *= 1 + (t1 - t0) * v
    x = NoiseSource(1).normal((4, H, A), np.float64)
    prior = -0.5 * np.sum((scale * x) ** 2 + np.log(2 * np.pi), axis=(1, 2))
    probes = 2.0 * NoiseSource(2).integers(0, 2, (8, H, A)) - 1  # of unit squares: the estimate is exact here
    found = policy.exact_log_probs({"state": tf.zeros([4, 1, OBS], tf.float64)}, tf.constant(x), tf.constant(probes))
    np.testing.assert_allclose(found, (prior + gained) / (np.log(2) * H * A), rtol=1e-12)


GAUSSIAN = {"sde_hutchinson_type": "Gaussian", "sde_num_epsilon": 1, "clip_vloss_coef": 0.1}


def updated(fast, options):
    """Old log-probabilities, losses and weights of two minibatches of 11 of 13 rows."""
    n = 13
    train = {f"{k}_{s}": v for k in ("actor", "critic") for s, v in (("lr", 1e-2), ("weight_decay", 0.0))}
    train |= {f"{k}_lr_scheduler": SCHEDULE for k in ("actor", "critic")} | {"vf_coef": 0.5, "max_grad_norm": 1.0}
    draw, trainer = NoiseSource(5), ExactDPPOTrainer(make_policy(**options), train | {"fast": fast}, H)
    state, actions = draw.normal((n, 1, OBS), np.float64), draw.uniform((n, H, A), -1, 1, np.float64)
    old = trainer.old_log_probs(state, {"actions": actions}, draw)
    rest = [draw.normal((n,), np.float64) for _ in range(3)]
    assert trainer.load(state, actions, *rest, old) == n
    losses = []
    for number in range(2):
        rows = draw.permutation(n)[:11]
        losses.append(list(trainer.minibatch(rows, True, number, trainer.draw(draw, 11)).values()))
    return [old, np.array(losses), *(v.numpy() for name in trainer.trained for v in trainer.trained[name])]


@pytest.mark.parametrize("options", [{}, pytest.param(GAUSSIAN, marks=pytest.mark.slow)])
def test_the_update_in_chunks_is_the_plain_one(options, monkeypatch):
    with precision("float64"):
        monkeypatch.setattr(dppo_exact, "CHUNK", 4)
        in_chunks = updated(True, options)
        monkeypatch.setattr(dppo_exact, "CHUNK", 1000)
        with eagerly():
            plain = updated(False, options)
    for a, b in zip(in_chunks, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)
    assert np.abs(in_chunks[1]).max() > 0


def test_what_it_cannot_do_is_said_in_one_line():
    with pytest.raises(UserError, match="sde_method=RK23: take one of euler"):
        make_policy(sde_method="RK23")
    with pytest.raises(UserError, match="take Rademacher or Gaussian"):
        make_policy(sde_hutchinson_type="uniform")
    with pytest.raises(UserError, match="no behaviour-cloning loss"):
        ExactDPPOTrainer(make_policy(), {"use_bc_loss": True}, H)
