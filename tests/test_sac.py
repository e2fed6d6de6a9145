"""Gaussian policies as SAC uses them: squashed samples and their densities, standard deviations."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.networks.gaussian import GaussianMLP
from diffusion_rl.policies.gaussian import gaussian_sample


def test_log_probability_of_a_squashed_sample():
    # x = 0.5 + 2 * 0.25 = 1, a = tanh(1); log N(1; 0.5, 2) - log(1 - a^2 + 1e-6)
    action, log_prob = gaussian_sample(tf.constant([[0.5]]), tf.constant([[2.0]]), tf.constant([[0.25]]), 10.0, True)
    density = -0.5 * 0.25**2 - np.log(2) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(action, [[np.tanh(1)]], rtol=1e-6)
    np.testing.assert_allclose(log_prob, [density - np.log(1 - np.tanh(1) ** 2 + 1e-6)], rtol=1e-6)
    clipped, _ = gaussian_sample(tf.constant([[0.0]]), tf.constant([[1.0]]), tf.constant([[50.0]]), 3.0, False)
    assert float(clipped[0, 0]) == 3.0


@pytest.mark.parametrize("kwargs", [{}, {"fixed_std": 0.2}, {"fixed_std": 0.2, "learn_fixed_std": True}])
def test_gaussian_network_standard_deviations(kwargs):
    network = GaussianMLP(2, 3, 4, [8, 8], std_min=0.05, std_max=0.1, **kwargs)
    mean, std = network({"state": tf.ones([5, 1, 4])})
    assert mean.shape == std.shape == (5, 6)
    if kwargs.get("learn_fixed_std"):
        np.testing.assert_allclose(std, 0.1, rtol=1e-6)  # clamped
    elif kwargs:
        np.testing.assert_allclose(std, 0.2)
    else:
        assert (std.numpy() > 0.05).all() and (std.numpy() < 0.1).all()
