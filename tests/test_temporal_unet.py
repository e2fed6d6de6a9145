"""Diffuser's networks: sizes, lengths, and what they refuse."""

import pytest
import tensorflow as tf

from diffusion_rl.core.errors import UserError
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
