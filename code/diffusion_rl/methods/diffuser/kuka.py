"""Diffuser for stacking blocks with a Kuka arm (Janner et al. 2022, section 5.3): plans of states alone.

Which states of a window are known is an input of the network, drawn anew for every window of a batch. Plans that are to
put one block on another are guided by a classifier of noisy states.

Shape letters: B batch, T denoising steps, H horizon, D = 39 width of a state. `noise` as in `methods.diffuser.model`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.batching import side_by_side
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.typing import Rng
from diffusion_rl.data.kuka import StackingDataset
from diffusion_rl.data.normalizers import IdentityNormalizer
from diffusion_rl.diffusion.inpainting import Conditions
from diffusion_rl.methods.diffuser.model import MIN_PART, Losses, NoisyTrajectories, TrajectoryDiffusion
from diffusion_rl.methods.diffuser.trainer import DiffuserTrainer
from diffusion_rl.networks.layers import Array
from diffusion_rl.tasks.kuka_stacking import BLOCK_DIM, BLOCKS, JOINTS, POSE_DIM, Pair

NEARER = 0.1  # weight of the distance between the blocks of a pair
LOOSE = -0.08  # gradient of whether another block hangs on the arm
STEP = 0.7  # along the gradient, in standard deviations of the denoising step
KINDS = 3  # of what is known of a window


def known_states(horizon: int) -> np.ndarray:
    """Returns what can be known of a window (first state, last, both; equally likely): [KINDS,H] of 0 and 1."""
    masks = np.zeros((KINDS, horizon), np.float32)
    masks[[0, 2], 0] = masks[[1, 2], -1] = 1
    return masks


class MaskedDiffusion(TrajectoryDiffusion):
    """The model of states; `model` maps (x [B,H,D], t [B], mask [B,H]) to noise [B,H,D].

    Arguments: `NoisyTrajectories`, with an action_dim of 0 and predicted noise.
    """

    KIND = "kuka"  # of checkpoints
    guide: StackGuide | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.action_dim or not self.predict_epsilon:
            raise UserError("a model of states predicts noise and has no actions: --predict_epsilon True")

    def loss(self, x: Array, mask: Array, t: Array, noise: Array) -> Losses:
        """Returns the mean error of the noise; x, noise [B,H,D], t [B] integers, mask [B,H] (1: the state is known).

        Known states are clean and their noise is zero, which the network has to say: they count like the others.
        `unknown_error` is the mean over the others.
        """
        free = 1 - mask[..., None]
        noise = noise * free
        noisy = tf.where(free > 0, self.q_sample(x, t, noise), x)
        errors = self.error(side_by_side(self.model, MIN_PART, noisy, t, mask) - noise)
        per_unknown = tf.reduce_sum(errors * free) / (tf.reduce_sum(free) * x.shape[2])
        return tf.reduce_mean(errors), {"unknown_error": per_unknown}

    # ---------- sampling: `TrajectoryDiffusion.sample`, with what follows in its place ----------

    def context(self, conditions: Conditions) -> Array:
        """Returns the mask [1,H], the same for all samples."""
        mask = np.zeros((1, self.horizon), self.dtype.as_numpy_dtype)
        mask[0, list(conditions)] = 1
        return tf.constant(mask)

    def output(self, x: Array, t: Array, context: Array) -> Array:
        """Maps x [B,H,D], t [B], mask [B,H] or [1,H] to noise [B,H,D]."""
        return self.model(x, t, context)

    def guided_by(self, guide: StackGuide) -> MaskedDiffusion:
        """Returns the same model, whose samples are guided."""
        guided = copy.copy(self)
        guided.guide = guide
        return guided

    def p_mean_variance(self, x: Array, t: Array, context: Any = None) -> tuple[Array, Array, Array]:
        """Returns mean [B,H,D], variance, log-variance [B,1,1] of x_{t-1}; a guide moves the mean by its gradient."""
        mean, variance, log_variance = super().p_mean_variance(x, t, context)
        if self.guide is not None:
            mean += STEP * tf.exp(0.5 * log_variance) * self.guide.gradient(x, t)
        return mean, variance, log_variance


class StackClassification(NoisyTrajectories):
    """Which pairs of blocks stand in noisy states; `model` maps (x [B,H,D], t [B]) to logits [B,H,12]."""

    KIND = "kuka_classifier"  # of checkpoints

    def loss(self, x: Array, labels: Array, t: Array, noise: Array) -> Losses:
        """Returns the mean cross-entropy of every state and pair; x, noise [B,H,D], labels [B,H,12] of 0 and 1, t [B]
        integers.

        `accuracy` is the share of right answers, and `found` that of the pairs that do stand (most do not).
        """
        logits = side_by_side(self.model, MIN_PART, self.q_sample(x, t, noise), t)
        loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))
        predicted = tf.cast(logits > 0, labels.dtype)
        recall = tf.math.divide_no_nan(tf.reduce_sum(predicted * labels), tf.reduce_sum(labels))
        return loss, {"accuracy": tf.reduce_mean(tf.cast(predicted == labels, loss.dtype)), "found": recall}


class StackGuide:
    """Moves plans towards one block upon another in their second half.

    Args:
        classifier: maps (x [B,H,D], t [B]) to logits [B,H,12] of `PAIRS`.
        top, bottom: numbers of the two blocks, integers or scalar tensors of them.
    """

    def __init__(self, classifier: Any, top: Any, bottom: Any):
        self.classifier, self.top, self.bottom = classifier, tf.convert_to_tensor(top), tf.convert_to_tensor(bottom)

    def score(self, x: Array, t: Array) -> Array:
        """Returns the sum of the pair's logits less a tenth of the blocks' mean distance along x and y, both over the
        second half: [B]."""
        half = x.shape[1] // 2
        pair = self.top * (BLOCKS - 1) + self.bottom - tf.cast(self.bottom > self.top, self.bottom.dtype)
        logits = tf.gather(self.classifier(x, t)[:, half:], pair, axis=2)
        position = _blocks(x)[:, half:, :, :2]
        apart = tf.abs(tf.gather(position, self.top, axis=2) - tf.gather(position, self.bottom, axis=2))
        return tf.reduce_sum(logits, axis=1) - NEARER * tf.reduce_mean(apart, axis=[1, 2])

    def gradient(self, x: Array, t: Array) -> Array:
        """Returns the gradient of the score, [B,H,D]; blocks that are to stay have none of their poses."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            score = self.score(x, t)
        gradient = tape.gradient(score, x)
        moved = tf.one_hot(self.top, BLOCKS, dtype=x.dtype)[:, None]
        stays = tf.constant([0.0] * POSE_DIM + [LOOSE], x.dtype)
        blocks = moved * _blocks(gradient) + (1 - moved) * stays
        return tf.concat([gradient[..., :JOINTS], tf.reshape(blocks, [*_leading(x), BLOCKS * BLOCK_DIM])], axis=-1)


def _blocks(x: Array) -> Array:
    """Cuts [B,H,39] into [B,H,4,8]."""
    return tf.reshape(x[..., JOINTS:], [*_leading(x), BLOCKS, BLOCK_DIM])


def _leading(x: Array) -> list[Any]:
    return [-1, x.shape[1]]


class StackingTrainer(DiffuserTrainer):
    """Steps of training of either model. An item is a window and what is known of it: window * KINDS + mask."""

    def __init__(self, model: Any, dataset: StackingDataset, *args: Any, **kwargs: Any):
        super().__init__(model, dataset, *args, **kwargs)
        self._labels = tf.constant(dataset.labels)
        self._masks = tf.constant(known_states(dataset.horizon), model.dtype)

    def loss(self, items: Array, t: Array, noise: Array) -> Losses:
        """Returns the model's loss on windows and kinds `items` [B] at t [B] with noise [B,H,D]."""
        rows = self.rows(items // KINDS)
        x = tf.gather(self._transitions, rows)
        if isinstance(self.model, StackClassification):
            return self.model.loss(x, tf.cast(tf.gather(self._labels, rows), x.dtype), t, noise)
        return self.model.loss(x, tf.gather(self._masks, items % KINDS), t, noise)


class StackingPlanner:
    """Plans from the current state.

    Args:
        diffusion: the model of states.
        normalizer: of states.
        classifier: the network of `StackClassification`; None: there are no pairs to ask for.
    """

    def __init__(self, diffusion: MaskedDiffusion, normalizer: IdentityNormalizer, classifier: Any = None):
        self.diffusion, self.normalizer, self.classifier = diffusion, normalizer, classifier
        self._sample = tf.function(self._plan, autograph=False)

    def plan(self, state: np.ndarray, pair: Pair | None, rng: Rng) -> np.ndarray:
        """Plans [H,39] from a state [39], both in the environment's units.

        Args:
            pair: (top, bottom): the block to put upon another; None: whatever the data have.
            rng: the source of all draws.
        """
        model = self.diffusion
        known = tf.constant(self.normalizer.normalize(np.asarray(state)[None]), model.dtype)
        drawn = rng.normal((model.n_timesteps + 1, 1, model.horizon, model.transition_dim))
        wanted = None if pair is None else tf.constant(pair, tf.int32)
        sampled = self._sample(known, tf.constant(drawn, model.dtype), wanted)
        return self.normalizer.unnormalize(sampled.numpy()[0])

    def _plan(self, known: Array, noise: Array, wanted: Array | None) -> Array:
        model = self.diffusion
        if wanted is not None:
            model = model.guided_by(StackGuide(self.classifier, wanted[0], wanted[1]))
        return model.sample({0: known}, noise).trajectories
