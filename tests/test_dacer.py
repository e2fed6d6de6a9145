"""DACER: the critics' loss and targets by hand, the temperature, its schedule, and the command line."""

import math

import numpy as np
import pytest
import tensorflow as tf
from tests.small_runs import rows, start, states
from tests.test_off_policy import HOPPER, overrides

from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.core.optimizers import AdamW, GradientSteps
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.data.replay import ReplayBuffer, fields
from diffusion_rl.methods.off_policy.algorithm import Progress
from diffusion_rl.methods.off_policy.buffers import Buffers, Rows
from diffusion_rl.methods.off_policy.dacer import DACER, distributional_loss
from diffusion_rl.networks.critics import DistributionalCritic
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.mlp import DiffusionMLP

A, H, OBS, K = 2, 2, 3, 3
SETTINGS = {
    **{"init_temperature": 0.5, "target_entropy": -4.0, "batch_size": 4, "replay_ratio": 2, "gamma": 0.9},
    **{"n_critic_warmup_itr": 1, "temperature_interval": 6, "entropy_states": 3, "entropy_samples": 40},
    **{"target_ema_rate": 0.1, "max_grad_norm": 1.0},
}


@pytest.fixture
def policy():
    with precision("float64"), initial_weights(NoiseSource(3)):
        actor = DiffusionMLP(A, H, OBS, 4, [8] * 3, residual_style=True)
        made = DACER(
            actor,
            DistributionalCritic(OBS, [8, 8], A, H),
            horizon_steps=H,
            obs_dim=OBS,
            action_dim=A,
            denoising_steps=K,
        )
        made.parts(SETTINGS)
        yield made


def test_the_loss_of_the_critics_by_hand():
    """One transition, two critics: m = (1, 2), s = (1, 2), w = (0.5, 1), y = 3, y_z = 7.

    y_b   = 1 + clip(6, -1.5, 1.5) = 2.5        and 2 + clip(5, -3, 3) = 5
    mean  : 1 (3 - 1) / (1 + 0.1) = 2 / 1.1     and 2 (3 - 2) / (4 + 0.1) = 2 / 4.1
    std   : 1 (1.5^2 - 1) / (1 + 0.1)           and 2 (3^2 - 4) / (8 + 0.1)
    """
    first = (0.5**2 + 0.1) * (2 / 1.1 + 1.25 / 1.1)
    second = (1 + 0.1) * (2 / 4.1 + 10 / 8.1)
    mean, std = tf.constant([[1.0], [2.0]], tf.float64), tf.constant([[1.0], [2.0]], tf.float64)
    rest = [tf.constant(value, tf.float64) for value in ([3.0], [7.0], [0.5, 1.0])]
    with tf.GradientTape() as tape:
        tape.watch([mean, std])
        loss = distributional_loss(mean, std, *rest)
    np.testing.assert_allclose(loss, -(first + second), rtol=1e-12)
    by_mean, by_std = tape.gradient(loss, [mean, std])  # through the leading m and s alone
    np.testing.assert_allclose(by_mean[:, 0], [-0.35 * 2 / 1.1, -1.1 * 1 / 4.1], rtol=1e-12)
    np.testing.assert_allclose(by_std[:, 0], [-0.35 * 1.25 / 1.1, -1.1 * 5 / 8.1], rtol=1e-12)


def batch_of(n: int, terminated: list[float]) -> Transitions:
    draw = NoiseSource(1)
    shapes = {"obs": (n, 1, OBS), "actions": (n, H, A), "next_obs": (n, 1, OBS), "rewards": (n,)}
    values = {name: tf.constant(draw.normal(shape, np.float64)) for name, shape in shapes.items()}
    return Transitions(**values, terminated=tf.constant(terminated, tf.float64))


def test_the_backup_is_of_the_target_critics_and_ends_with_the_episode(policy):
    batch, noise = batch_of(2, [0.0, 1.0]), NoiseSource(2)
    draws = [noise.normal(policy.noise_shape(2), np.float64), noise.normal((2, H, A), np.float64), [5.0, -1.0]]
    before = policy.targets(batch, 0.9, *map(tf.constant, draws[:2]), tf.constant(draws[2], tf.float64))
    for variable in variables_of(policy.critic):
        variable.assign_add(tf.ones_like(variable))
    target, drawn = policy.targets(batch, 0.9, *map(tf.constant, draws[:2]), tf.constant(draws[2], tf.float64))
    np.testing.assert_array_equal(target, before[0])  # not of the trained ones
    np.testing.assert_array_equal([target[1], drawn[1]], [batch.rewards[1]] * 2)
    following = {"state": batch.next_obs}
    mean, std = policy.critic_target(following, policy.explored(following, *map(tf.constant, draws[:2])))
    smaller = int(tf.argmin(mean[:, 0]))
    np.testing.assert_allclose(target[0], batch.rewards[0] + 0.9 * mean[smaller, 0], rtol=1e-12)
    np.testing.assert_allclose(drawn[0], target[0] + 0.9 * std[smaller, 0] * 3, rtol=1e-12)  # 5 is cut at 3
    assert (std.numpy() > 0).all()


def test_the_running_deviation_begins_with_the_first_batch_and_moves_slowly(policy):
    batch = batch_of(5, [0.0] * 5)
    _, std = policy.critic({"state": batch.obs}, batch.actions)
    mean = std.numpy().mean(axis=1)
    np.testing.assert_allclose(policy.update_std_scale(batch, 0.1), mean, rtol=1e-12)
    policy.std_scale.assign([1.0, 2.0])
    np.testing.assert_allclose(policy.update_std_scale(batch, 0.1), 0.9 * np.array([1, 2]) + 0.1 * mean, rtol=1e-12)


def test_exploration_has_the_size_that_is_learned_and_evaluation_none(policy):
    cond, noise = {"state": tf.zeros([1, 1, OBS], tf.float64)}, NoiseSource(4)
    chain = tf.constant(noise.normal(policy.noise_shape(1), np.float64))
    small = tf.constant(0.01 * noise.normal((1, H, A), np.float64))
    draws = {"noise": chain, "exploration": small}
    quiet, loud = (policy.act(cond, draws, deterministic, SETTINGS).numpy() for deterministic in (True, False))
    np.testing.assert_allclose(loud, np.clip(quiet + 0.5 * 0.15 * small.numpy(), -1, 1), rtol=1e-12)
    assert np.abs(quiet).max() <= 1


@pytest.mark.parametrize(("target", "sign"), [(100.0, 1), (-100.0, -1)])
def test_alpha_grows_exactly_while_the_entropy_is_below_its_target(policy, target, sign):
    buffers = Buffers(ReplayBuffer(9, fields(("obs",), (1, OBS), (H, A))))
    buffers.online.add(obs=NoiseSource(1).normal((9, 1, OBS), np.float64))
    buffers.online.flush()
    settings = SETTINGS | {"target_entropy": target}
    noise = NoiseSource(5)
    draws = policy.draw_temperature(noise, Rows(buffers, noise, 1), settings, True)
    step = GradientSteps({"log_alpha": AdamW([policy._log_alpha], 0.03)})
    found = policy.update_temperature(buffers, draws, step, settings, True)
    assert math.isfinite(found["entropy"]) and abs(float(found["entropy"])) < 50
    np.testing.assert_allclose(policy._log_alpha.numpy() - math.log(0.5), sign * 0.03, rtol=1e-6)


def test_the_temperatures_turn_comes_after_so_many_steps_of_the_critics(policy):
    """A step of 16 transitions gives 8 steps of the critics, so 4 updates; every third is followed by the other."""

    def plan(itr):
        found = policy.phases(SETTINGS, Progress(itr, 16, 16, 0))
        done = sum(phase.n for phase in found if phase.update == "update")
        policy.n_updates.assign_add([done])
        return [(phase.n, phase.update == "update", phase.train_actor) for phase in found]

    assert plan(0) == [(4, True, False)]
    assert plan(1) == [(2, True, True), (1, False, True), (2, True, True)]
    assert plan(2) == [(1, True, True), (1, False, True), (3, True, True), (1, False, True)]


@pytest.mark.slow
def test_the_command(tmp_path):
    name = f"{HOPPER}/ft_dacer_mlp"
    folder, _, config_name = name.rpartition("/")
    given = [*overrides(name, tmp_path), "train.n_train_itr=2", "train.temperature_interval=6", "+train.fast=false"]
    process = start(
        [f"--config-dir=cfg/{folder}", f"--config-name={config_name}", *given, f"logdir={tmp_path / 'run'}"]
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    evaluated, trained = rows(tmp_path / "run")
    assert (evaluated["kind"], trained["kind"], trained["updates"]) == ("eval", "train", 4)
    for key in ("loss_critic", "loss_actor", "loss_temperature", "entropy", "log_alpha"):
        assert math.isfinite(trained[key]), key
    assert states(tmp_path / "run") == ["state_0.safetensors", "state_1.safetensors"]
