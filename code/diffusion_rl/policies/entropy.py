"""Estimates of differential entropy from samples, for many distributions at once.

Shapes: B distributions, N samples of each, D dimensions, M modes of a mixture. Results are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import tensorflow as tf

from diffusion_rl.core.typing import Array

FLOOR = 1e-6  # added to variances of mixtures, as scikit-learn does
EM_STEPS, LLOYD_STEPS = 30, 10


def nearest_neighbour_entropy(samples: Array, k: int = 3) -> Array:
    """Returns Kozachenko & Leonenko's (1987) estimate from the distance to the k-th nearest neighbour, [B,N,D] -> [B].

        H = psi(N) - psi(k) + log V_D + D mean_i log rho_i,      V_D: volume of the unit ball

    Scaling the samples by s adds exactly D log s. It is differentiable in the samples.
    """
    n, d = samples.shape[1], samples.shape[2]
    squares = tf.reduce_sum(tf.square(samples[:, :, None] - samples[:, None]), axis=-1)
    squares += tf.eye(n, dtype=samples.dtype) * samples.dtype.max / 4  # nobody is its own neighbour
    kth = -tf.math.top_k(-squares, k).values[..., -1]
    log_volume = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)
    digammas = tf.math.digamma(tf.constant([n, k], samples.dtype))
    return digammas[0] - digammas[1] + log_volume + 0.5 * d * tf.reduce_mean(tf.math.log(kth + 1e-12), axis=-1)


def mixture_entropy(samples: Array, n_modes: int = 3) -> Array:
    """Returns the entropy of the mixture of Gaussians fitted to each set of samples, [B,N,D] -> [B] float64.

        H = -sum_k w_k log w_k + sum_k w_k (D (1 + log 2 pi) + log det Sigma_k) / 2

    (an upper bound, which counts modes as if they did not overlap). All fits run side by side: means start at points
    far from each other, a few steps of Lloyd's algorithm, then expectation maximisation with full covariances.
    """
    x = tf.cast(samples, tf.float64)
    share = _repeated(lambda share: _expect(x, *_maximise(x, share)), _lloyd(x, n_modes), EM_STEPS)
    weights, _, roots = _maximise(x, share)
    log_det = 2 * tf.reduce_sum(tf.math.log(tf.linalg.diag_part(roots)), axis=-1)
    gaussians = 0.5 * (x.shape[-1] * (1 + math.log(2 * math.pi)) + log_det)
    return tf.reduce_sum(weights * gaussians - tf.math.xlogy(weights, weights), axis=-1)


def _lloyd(x: Array, n_modes: int) -> Array:
    """Runs k-means. Returns the share of each mode in each sample [B,N,M], 0 or 1."""
    chosen = [x[:, 0]]
    for _ in range(n_modes - 1):
        distances = tf.reduce_min(_squared_distances(x, tf.stack(chosen, axis=1)), axis=-1)
        chosen.append(tf.gather(x, tf.argmax(distances, axis=-1), axis=1, batch_dims=1))

    def nearest(means: Array) -> Array:
        return tf.one_hot(tf.argmin(_squared_distances(x, means), axis=-1), n_modes, dtype=x.dtype)

    def centres(means: Array) -> Array:
        share = nearest(means)
        counts = tf.reduce_sum(share, axis=1)[..., None]
        return tf.where(counts > 0, tf.einsum("bnm,bnd->bmd", share, x) / tf.maximum(counts, 1), means)

    return nearest(_repeated(centres, tf.stack(chosen, axis=1), LLOYD_STEPS - 1))


def _repeated(step: Callable[[Array], Array], value: Array, n: int) -> Array:
    """Returns step(step(... value)), n times, as a loop of the compiled program: unrolled it takes a minute to
    compile."""
    return tf.while_loop(lambda i, _: i < n, lambda i, v: (i + 1, step(v)), (0, value))[1]


def _squared_distances(x: Array, means: Array) -> Array:
    """Maps [B,N,D], [B,M,D] to [B,N,M]."""
    return tf.reduce_sum(tf.square(x[:, :, None] - means[:, None]), axis=-1)


def _maximise(x: Array, share: Array) -> tuple[Array, Array, Array]:
    """Returns weights [B,M], means [B,M,D] and Cholesky factors [B,M,D,D] of the covariances."""
    counts = tf.reduce_sum(share, axis=1) + 1e-15
    means = tf.einsum("bnm,bnd->bmd", share, x) / counts[..., None]
    centred = x[:, :, None] - means[:, None]
    covariances = tf.einsum("bnm,bnmd,bnme->bmde", share, centred, centred) / counts[..., None, None]
    covariances += FLOOR * tf.eye(x.shape[-1], dtype=x.dtype)
    return counts / tf.reduce_sum(counts, axis=-1, keepdims=True), means, tf.linalg.cholesky(covariances)


def _expect(x: Array, weights: Array, means: Array, roots: Array) -> Array:
    """Returns the share of each mode in each sample [B,N,M]."""
    centred = tf.transpose(x[:, None] - means[:, :, None], [0, 1, 3, 2])  # [B,M,D,N]
    whitened = tf.linalg.triangular_solve(roots, centred)
    log_det = tf.reduce_sum(tf.math.log(tf.linalg.diag_part(roots)), axis=-1)
    log_prob = -0.5 * tf.reduce_sum(tf.square(whitened), axis=2) - log_det[..., None]
    return tf.nn.softmax(tf.transpose(log_prob + tf.math.log(weights)[..., None], [0, 2, 1]), axis=-1)
