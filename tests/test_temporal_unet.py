"""Diffuser's networks: sizes, lengths, and what they refuse."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.diffusion.guidance import Guide
from diffusion_rl.methods.diffuser.model import TrajectoryDiffusion, ValueDiffusion
from diffusion_rl.networks.convolution import plain_convolutions
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.temporal_unet import TemporalUnet, ValueFunction
from diffusion_rl.networks.unet1d import Downsample, Upsample


def parameters(network):
    return sum(v.shape.num_elements() for v in variables_of(network))


@pytest.mark.parametrize(
    ("transition_dim", "horizon", "dim_mults", "attention", "count"),
    [
        (14, 32, (1, 2, 4, 8), False, 3_956_302),  # hopper
        (23, 32, (1, 2, 4, 8), False, 3_958_327),  # walker2d
        (23, 4, (1, 4, 8), True, 4_114_423),  # halfcheetah
        (6, 128, (1, 4, 8), False, 3_682_118),  # maze2d
    ],
)
def test_parameters_of_the_unet(transition_dim, horizon, dim_mults, attention, count):
    assert parameters(TemporalUnet(horizon, transition_dim, dim_mults=dim_mults, attention=attention)) == count


@pytest.mark.parametrize(
    ("transition_dim", "horizon", "dim_mults", "count"),
    [(14, 32, (1, 2, 4, 8), 2_294_817), (23, 32, (1, 2, 4, 8), 2_296_545), (23, 4, (1, 4, 8), 2_180_833)],
)
def test_parameters_of_the_value_network(transition_dim, horizon, dim_mults, count):
    assert parameters(ValueFunction(horizon, transition_dim, dim_mults=dim_mults)) == count


@pytest.mark.parametrize(("length", "halved"), [(1, 1), (7, 4), (8, 4)])
def test_lengths(length, halved):
    x = tf.zeros([length, 2, 5])
    assert Downsample(5)(x).shape[0] == halved
    assert Upsample(5)(x).shape[0] == 2 * length


def test_what_is_refused():
    with pytest.raises(UserError, match="multiple of 4"):
        TemporalUnet(6, 5, dim=8, dim_mults=(1, 2, 4))
    network = TemporalUnet(8, 5, dim=8, dim_mults=(1, 2, 4))
    with pytest.raises(UserError, match="multiple of 4"):
        network(tf.zeros([2, 10, 5]), tf.zeros([2], tf.int32))
    with pytest.raises(UserError, match="multiple of 32"):
        ValueFunction(8, 5, dim=8, dim_mults=(1, 2))
    with pytest.raises(UserError, match="horizon 8, not 4"):
        ValueFunction(8, 5, dim=8, dim_mults=(1, 4))(tf.zeros([2, 4, 5]), tf.zeros([2], tf.int32))


def test_a_first_level_wider_than_dim_works():
    network = TemporalUnet(4, 5, dim=8, dim_mults=(2, 4))  # the reference fails here
    assert network(tf.zeros([2, 4, 5]), tf.zeros([2], tf.int32)).shape == (2, 4, 5)


def models(horizon=8, observation_dim=3, action_dim=2, steps=4):
    sizes = (horizon, observation_dim, action_dim, steps)
    with precision("float64"), initial_weights(NoiseSource(0)):
        networks = [make(horizon, 5, dim=16, dim_mults=(1, 2)) for make in (TemporalUnet, ValueFunction)]
        diffusion = TrajectoryDiffusion(networks[0], *sizes, "l2", predict_epsilon=False)
        return diffusion, ValueDiffusion(networks[1], *sizes, "value_l2", predict_epsilon=False)


def test_fast_convolutions_change_nothing_but_rounding():
    """Gradients of every weight and a guided decision, in float64, beside the plain ones."""
    (diffusion, value), draw = models(), NoiseSource(1)
    x, t = tf.constant(draw.normal((6, 8, 5), np.float64)), tf.constant([0, 1, 2, 3, 0, 1])
    known, noise = {0: x[:, 0, 2:]}, tf.constant(draw.normal((5, 6, 8, 5), np.float64))
    guide = Guide(value.value, scale=0.1, n_guide_steps=2, t_stopgrad=1)

    def results():
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(tf.sin(diffusion.model(x, t))) + tf.reduce_sum(tf.sin(value.model(x, t)))
        gradients = tape.gradient(total, [v for each in (diffusion, value) for v in variables_of(each.model)])
        return [*gradients, *tf.function(lambda: diffusion.sample(known, noise, guide)[:2], autograph=False)()]

    fast = results()
    with plain_convolutions():
        plain = results()
    for one, other in zip(fast, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * max(1, np.abs(other).max()))


def test_steps_that_are_not_guided_cost_nothing_and_change_nothing():
    """`sample` leaves out what `t_stopgrad` makes nothing; `step` by `step` everything is computed."""
    (diffusion, value), draw = models(), NoiseSource(2)
    noise = tf.constant(draw.normal((5, 3, 8, 5), np.float64))
    known = {0: tf.constant(draw.normal((3, 3), np.float64))}
    guide = Guide(value.value, scale=0.1, n_guide_steps=2, t_stopgrad=2)
    fixed = diffusion.known(known, noise[0])
    x = fixed.put(noise[0])
    for i, t in enumerate(reversed(range(4))):
        x, values = diffusion.step(x, tf.fill([3], t), noise[i + 1], fixed, guide)
        x = fixed.put(x)
    order = np.argsort(-values.numpy())
    plans = diffusion.sample(known, noise, guide)
    np.testing.assert_allclose(plans.values, values.numpy()[order], rtol=1e-10)
    np.testing.assert_allclose(plans.trajectories, x.numpy()[order], rtol=0, atol=1e-10)
