"""Supervised training of a policy on demonstrations: its own loss, AdamW, an average of the weights.

Diffusion policies learn by DDPM's loss, flows by flow matching, Gaussian and mixture policies by maximum likelihood.

Many steps run in one compiled call. Shapes: M windows of the data set, n steps, B windows per step; H, O, A, To as in
`policies.diffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core import replicas
from diffusion_rl.core.batching import dealing_products, parts, summed
from diffusion_rl.core.ema import follow
from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.core.optimizers import AdamW
from diffusion_rl.core.precision import backward_in
from diffusion_rl.networks.flow import ShortcutFlowMLP
from diffusion_rl.networks.folded import can_fold
from diffusion_rl.networks.gaussian import GaussianMLP
from diffusion_rl.networks.gmm import GMMMLP
from diffusion_rl.networks.layers import Array, clone, variables_of
from diffusion_rl.networks.mlp import DiffusionMLP, split_masks
from diffusion_rl.policies.diffusion import Cond, DiffusionPolicy
from diffusion_rl.policies.flow import FlowPolicy
from diffusion_rl.policies.gaussian import GaussianPolicy
from diffusion_rl.policies.gmm import GMMPolicy

BATCHES_PER_CALL = 10  # of the compiled training function
#: Rows of a part of a batch that is dealt to the cores, at the least. Summing the parts' gradients goes through memory
#: three times for each weight; a perceptron multiplies a row by each weight only once, so its parts must be larger.
ROWS_OF_A_PART, OF_PERCEPTRONS = 64, 256

PreTrainable = DiffusionPolicy | FlowPolicy | GaussianPolicy | GMMPolicy
Batch = tuple[Array, Cond, Array, Array]
PERCEPTRONS = (DiffusionMLP, ShortcutFlowMLP, GaussianMLP, GMMMLP)


class PreTrainer:
    """Trains a policy on a data set held in memory.

    Args:
        policy: trained in place; `ema_network` is its average.
        dataset: `states` [N,O] and `actions` [N,A] of all trajectories, one after the other; `indices` [M,2] of its
            windows (first step, steps since the episode began); `images` [N,C,Hi,Wi], bytes, or None.
        train: that node of the configuration.
    """

    def __init__(self, policy: PreTrainable, dataset: Any, train: Mapping[str, Any], ema_decay: float):
        self.policy, self.dataset, self.ema_decay = policy, dataset, float(ema_decay)
        self.ent_coef, self.fast = float(train.get("ent_coef", 0)), bool(train.get("fast", True))
        self.precision = train.get("precision")
        self.ema_network = clone(policy.network)
        self.variables, self.averaged = variables_of(policy.network), variables_of(self.ema_network)
        self.schedule = CosineWarmupRestarts.of(train, rate="learning_rate")
        self.optimizer = AdamW(self.variables, self.schedule.lr, train["weight_decay"], fused=self.fast)
        arrays = ((dataset.states, policy.dtype), (dataset.actions, policy.dtype), (dataset.indices, tf.int32))
        self.data = tuple(tf.constant(array, dtype) for array, dtype in arrays)
        self.images = None if dataset.images is None else tf.constant(dataset.images)
        self.folds = self.fast and can_fold(policy.network)
        if isinstance(policy, DiffusionPolicy):
            policy.fast = self.folds
        self._steps = tf.function(self._train_steps, reduce_retracing=True)
        self._loss = tf.function(lambda *b: self.loss(self.batch(*b)), reduce_retracing=True, autograph=False)

    # ---------- one batch ----------

    def batch(self, items: Array, t: Array, noise: Array, shifts: Array) -> Batch:
        """Gathers the windows `items` [B]: (action chunks [B,H,A], observations, t, noise).

        The observations are {"state": [B,To,O]}, or, where the network sees, what it makes of them and of the images,
        shifted by `shifts` [B,cameras,2] if there are any.
        """
        states, actions, windows = self.data
        window = tf.gather(windows, items)
        start, since_begin = window[:, :1], window[:, 1:]
        chunk = tf.gather(actions, start + tf.range(self.policy.horizon_steps)[None])

        def history(steps: int) -> Array:  # an episode's first observation fills a short history
            return start - tf.minimum(tf.reverse(tf.range(steps), [0])[None], since_begin)

        cond = {"state": tf.gather(states, history(self.dataset.cond_steps))}
        if self.images is not None:
            cond["rgb"] = tf.gather(self.images, history(self.dataset.img_cond_steps))
            cond = self.policy.network.encode(cond, shifts if shifts.shape[-1] else None)
        return chunk, cond, t, noise

    def loss(self, batch: Batch) -> Array:
        """Returns the policy's loss, a scalar; folded networks give the same number for less work."""
        chunk, cond, t, noise = batch
        p = self.policy
        if isinstance(p, DiffusionPolicy | FlowPolicy):
            return p.loss(chunk, cond, t, noise)
        masks = split_masks(p.network, noise)
        dropout = {"keep_masks": masks} if masks else {}
        return p.loss(chunk, cond, ent_coef=self.ent_coef, **dropout)[0]

    # ---------- many steps ----------

    def steps(
        self,
        items: np.ndarray,
        t: np.ndarray,
        noise: np.ndarray,
        average: np.ndarray,
        shifts: np.ndarray | None = None,
    ) -> np.ndarray:
        """Trains on n batches in order.

        Args:
            items: [n,B] window numbers;  t: [n,B];  noise: [n,B,H,A];  average: [n] of KEEP, COPY, AVERAGE.
                (t and noise are of diffusion policies and flows, some of whose times are pairs, [n,B,2]. Others do not
                look at t; their noise are dropout's masks, [n,B,sum of their widths].)
            shifts: [n,B,cameras,2], where images are augmented.

        Returns:
            the loss of each step [n].
        """
        return self._steps(*self._inputs(items, t, noise, shifts), tf.constant(average, tf.int32)).numpy()

    def evaluate(self, items: np.ndarray, t: np.ndarray, noise: np.ndarray) -> float:
        """Returns the loss of one batch, items and t [B], noise [B,...], without training."""
        return float(self._loss(*self._inputs(items, t, noise, None)).numpy())

    def _inputs(self, items: np.ndarray, t: np.ndarray, noise: np.ndarray, shifts: np.ndarray | None) -> list[Array]:
        shifts = np.zeros((*items.shape, 0)) if shifts is None else shifts
        time = tf.int32 if t.dtype.kind == "i" else self.policy.dtype
        types = (tf.int32, time, self.policy.dtype, tf.int32)
        return [tf.constant(array, dtype) for array, dtype in zip((items, t, noise, shifts), types, strict=True)]

    def _train_steps(self, items: Array, t: Array, noise: Array, shifts: Array, average: Array) -> Array:
        plain = tf.autograph.experimental.do_not_convert  # AutoGraph is for the loop alone
        step, gathered = plain(self._one_step), plain(self._gathered)
        inputs = (items, t, noise, shifts) if self._encodes else gathered(items, t, noise, shifts)
        n = tf.shape(items)[0]
        losses = tf.TensorArray(self.policy.dtype, size=n)
        for i in tf.range(n):
            one = tf.nest.map_structure(lambda values, i=i: values[i], inputs)
            losses = losses.write(i, step(one, average[i]))
        return losses.stack()

    @property
    def _encodes(self) -> bool:
        """Returns whether a batch depends on the weights, and its images on memory."""
        return self.images is not None

    def _gathered(self, items: Array, t: Array, noise: Array, shifts: Array) -> Batch:
        """Returns `batch` of all n steps at once, each of its arrays [n,B,...]."""
        lead = tf.shape(items)

        def rows(values: Array) -> Array:  # [n,B,...] -> [n*B,...]
            return tf.reshape(values, tf.concat([[lead[0] * lead[1]], tf.shape(values)[2:]], axis=0))

        def steps(values: Array) -> Array:
            stacked = tf.reshape(values, tf.concat([lead, tf.shape(values)[1:]], axis=0))
            return tf.ensure_shape(stacked, [*items.shape, *values.shape[1:]])

        batch = self.batch(*(rows(values) for values in (items, t, noise, shifts)))
        return tf.nest.map_structure(steps, batch)

    def _one_step(self, inputs: Any, average: Array) -> Array:
        with backward_in(self.precision), dealing_products(self.fast):
            loss, grads = replicas.averaged(lambda *part: self._gradients(part), *inputs)
        self.optimizer.apply(grads)
        follow(self.averaged, self.variables, average, self.ema_decay)
        return loss

    def _gradients(self, inputs: Any) -> tuple[Array, list[Array]]:
        """Returns the loss of some rows, a scalar, and its gradients, computed on all cores."""
        losses, grads = zip(*(self._part(part) for part in self._parts(inputs)), strict=True)
        return _mean(losses), [_mean(each) for each in zip(*grads, strict=True)]

    def _part(self, inputs: Any) -> tuple[Array, list[Array]]:
        """Returns the loss of some rows, a scalar, and its gradients by the variables.

        inputs: arguments of `batch` where images have to be encoded, else what it returned.
        """
        with tf.GradientTape() as tape:
            loss = self.loss(self.batch(*inputs) if self._encodes else inputs)
        return loss, tape.gradient(loss, self.variables)

    def _parts(self, inputs: Any) -> list[Any]:
        """Deals the rows of a batch to the cores, as many to each; TensorFlow works on the parts side by side.

        Policies whose rows depend on their place in the batch (`DEALT = False`) keep it whole.
        """
        rows, deals = inputs[0].shape[0], self.fast and getattr(self.policy, "DEALT", True)
        if not deals or rows is None:
            return [inputs]
        least = OF_PERCEPTRONS if isinstance(self.policy.network, PERCEPTRONS) else ROWS_OF_A_PART
        return [tf.nest.map_structure(lambda values, cut=cut: values[cut], inputs) for cut in parts(rows, least)]

    def end_epoch(self) -> None:
        """Advances the learning rate."""
        self.optimizer.learning_rate.assign(self.schedule.step())


def _mean(values: Sequence[Any]) -> Any:
    """Averages tensors of one shape [...]; None where all are."""
    if values[0] is None or len(values) == 1:
        return values[0]
    return summed(values) / len(values)
