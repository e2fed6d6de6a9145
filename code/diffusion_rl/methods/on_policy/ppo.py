"""PPO: Proximal Policy Optimization (Schulman et al. 2017, arXiv:1707.06347), and what its kinds here share.

    ClippedPPO   the clipped losses of actor and critic (eq. 7), mixed into a policy that has a `critic`
    ChunkPPO     PPO of policies whose action chunk is one decision: Gaussian and mixture policies
    PPOTrainer   the update from one rollout: values and old log-probabilities, advantages (GAE), then epochs of
                 minibatches with a gradient step each, until the KL divergence grows too large

Shapes: S steps of E environments, N = S*E samples of a rollout, B rows of a minibatch; To, O, H, A as in
`policies.diffusion`. Where networks see, an observation is `state` [N,To,O] and `rgb` [N,To,C,Hi,Wi], which stays in
bytes until a network takes it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.core.optimizers import AdamW, OptimizerGroup, clip_by_global_norm
from diffusion_rl.core.precision import backward_in
from diffusion_rl.core.returns import gae
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.on_policy.shared import Gradients, Losses, SharedGradients
from diffusion_rl.networks.layers import Array, trainable_of
from diffusion_rl.networks.mlp import folding
from diffusion_rl.networks.vision import RandomShiftsAug
from diffusion_rl.policies.acting import actor_for
from diffusion_rl.training.rollout import Rollout

log = logging.getLogger(__name__)

LOG_PROB_RANGE = (-5.0, 2.0)  # old and new alike; what is outside gets no gradient
compiled = functools.partial(tf.function, autograph=False)  # no tensor decides a branch here

PerRow = tuple[Array, Array, Array, Array]  # loss, ratio, approximate KL, outside of the clip range; [B] each
Obs = dict[str, Array]


# ---------- the loss ----------


def clipped_policy_loss(log_prob: Array, old_log_prob: Array, advantages: Array, clip_range: Array) -> PerRow:
    """Clip PPO's loss per row (Schulman et al. 2017, eq. 7). All arguments are [B]; the clip range may be a scalar.

    Returns:
        loss, ratio, approximate KL ((r - 1) - log r), and whether the ratio left the clip range.
    """
    log_ratio = log_prob - old_log_prob
    ratio = tf.exp(log_ratio)
    clipped = tf.clip_by_value(ratio, 1 - clip_range, 1 + clip_range)
    loss = tf.maximum(-advantages * ratio, -advantages * clipped)
    approx_kl = tf.stop_gradient((ratio - 1) - log_ratio)
    outside = tf.cast(tf.abs(ratio - 1) > clip_range, ratio.dtype)
    return loss, ratio, approx_kl, outside


def chunk_log_prob(log_prob: Array, reward_horizon: int) -> Array:
    """Averages log-probabilities of denoising steps, [...,H,A] -> [...].

    Each element is clamped first; only the first `reward_horizon` actions count.
    """
    return tf.reduce_mean(tf.clip_by_value(log_prob, *LOG_PROB_RANGE)[..., :reward_horizon, :], axis=[-2, -1])


class ClippedPPO:
    """Advantages and the loss of actor and critic, for policies with a `critic`; stands before the policy's class.

    Args:
        clip_ploss_coef: clip range of the ratio.
        clip_vloss_coef: clip range of the change of the value (None: not clipped).
        norm_adv: normalise advantages within the minibatch.
        kwargs: of the policy.
    """

    critic: Any
    _normalised_before = False

    def __init__(
        self, clip_ploss_coef: float, clip_vloss_coef: float | None = None, norm_adv: bool = True, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.clip_ploss_coef, self.clip_vloss_coef, self.norm_adv = clip_ploss_coef, clip_vloss_coef, norm_adv

    def normalised(self, advantages: Array, among: Array | None = None) -> Array:
        """Returns advantages [...] with mean 0 and deviation 1, where that is asked for.

        Args:
            among: the minibatch's [B], whose mean and deviation are meant; None: these themselves.
        """
        if not self.norm_adv or self._normalised_before:
            return advantages
        among = advantages if among is None else among
        mean = tf.reduce_mean(among)
        # unbiased deviation (N - 1), as torch.std
        n = tf.cast(tf.size(among), among.dtype)
        std = tf.sqrt(tf.reduce_sum(tf.square(among - mean)) / (n - 1))
        return (advantages - mean) / (std + 1e-8)

    @contextlib.contextmanager
    def normalised_before(self) -> Iterator[None]:
        """Takes advantages as they are meanwhile: of a part of a minibatch, the whole of which was normalised."""
        self._normalised_before = True
        try:
            yield
        finally:
            self._normalised_before = False

    def policy_loss(self, log_prob: Array, old_log_prob: Array, advantages: Array) -> PerRow:
        """Returns `clipped_policy_loss` of chunks that are single decisions: log-probabilities [B] are clamped here."""
        return clipped_policy_loss(
            tf.clip_by_value(log_prob, *LOG_PROB_RANGE),
            tf.clip_by_value(old_log_prob, *LOG_PROB_RANGE),
            advantages,
            tf.constant(self.clip_ploss_coef, log_prob.dtype),
        )

    def value_loss(self, values: Array, returns: Array, oldvalues: Array) -> Array:
        """Returns half the squared error [B], optionally with the change of the value clipped."""
        loss = tf.square(values - returns)
        if self.clip_vloss_coef is not None:
            bound = self.clip_vloss_coef
            clipped = oldvalues + tf.clip_by_value(values - oldvalues, -bound, bound)
            loss = tf.maximum(loss, tf.square(clipped - returns))
        return 0.5 * loss

    def mean_losses(self, per_row: PerRow, obs: Obs, returns: Array, oldvalues: Array) -> Losses:
        """Averages over the rows: what `clipped_policy_loss` gave, and the critic's loss on the observations."""
        pg_loss, ratio, approx_kl, clipfrac = (tf.reduce_mean(value) for value in per_row)
        values = tf.reshape(self.critic(obs), [-1])
        v_loss = tf.reduce_mean(self.value_loss(values, returns, oldvalues))
        ratio = tf.stop_gradient(ratio)
        return {"pg_loss": pg_loss, "v_loss": v_loss, "clipfrac": clipfrac, "approx_kl": approx_kl, "ratio": ratio}


class ChunkPPO(ClippedPPO):
    """PPO for Gaussian and mixture policies: the action chunk is one decision."""

    log_probs: Any  # of the policy: observation, actions -> log-probabilities [B], entropy, standard deviation

    def loss(
        self,
        obs: Obs,
        actions: Array,
        returns: Array,
        oldvalues: Array,
        advantages: Array,
        oldlogprobs: Array,
        use_bc_loss: bool = False,
        bc_noise: Array | None = None,
    ) -> Losses:
        """Returns the loss of one minibatch.

        Args:
            obs: {"state": [B,To,O]};  actions: [B,H,A];  returns, oldvalues, advantages: [B]
            oldlogprobs: [B], in the policy's way of counting, of the policy that collected the data.
            use_bc_loss, bc_noise: add `bc_loss`, drawn with bc_noise.
        """
        log_prob, entropy, std = self.log_probs(obs, actions)
        per_row = self.policy_loss(log_prob, oldlogprobs, self.normalised(advantages))
        return {
            **self.mean_losses(per_row, obs, returns, oldvalues),
            "entropy_loss": -entropy,
            "bc_loss": self.bc_loss(obs, bc_noise) if use_bc_loss else tf.zeros([], log_prob.dtype),
            "std": tf.stop_gradient(std),
        }

    def bc_noise_shape(self, rows: int) -> tuple[int, ...] | None:
        """Returns the shape of the noise of `bc_loss`; None: the algorithm has no such loss."""
        return None

    def bc_loss(self, obs: Obs, noise: Array | None) -> Array:
        """Returns what imitation of the pre-trained policy adds, a scalar: 0 unless the algorithm has such a loss."""
        return tf.zeros([], obs["state"].dtype)

    def make_trainer(self, settings: Mapping[str, Any], reward_horizon: int) -> PPOTrainer:
        """Builds what updates this policy; arguments of `PPOTrainer`."""
        return PPOTrainer(self, settings, reward_horizon)


# ---------- the update ----------


class PPOTrainer(SharedGradients):
    """Updates a policy from rollouts; trainers of diffusion policies say what a row is and how it is differentiated.

    Args:
        policy: with its loss; its weights are trained in place.
        settings: the `train` node of the configuration.
        reward_horizon: actions of a chunk that count in the loss of denoising steps.
    """

    SAMPLES: ClassVar[str] = "actions"  # which part of a decision the update is about
    CLIPPED: ClassVar[tuple[str, ...]] = ("actor",)  # whose gradients `train.max_grad_norm` is for
    SHIFTS_LAST: ClassVar[bool] = False  # whether images are shifted also where a rollout ends

    def __init__(self, policy: Any, settings: Mapping[str, Any], reward_horizon: int):
        self.policy, self.settings, self.reward_horizon = policy, settings, reward_horizon
        if getattr(getattr(policy, "network", None), "dropout", 0):
            log.warning("the network's dropout acts in supervised training alone: fine-tuning drops nothing")
        self.trained = {name: trainable_of(module) for name, module in self.modules().items()}
        schedules = {name: CosineWarmupRestarts.of(settings, f"{name}_") for name in self.trained}
        optimizers = {
            name: AdamW(variables, schedules[name].lr, settings[f"{name}_weight_decay"])
            for name, variables in self.trained.items()
        }
        self.optimizers = OptimizerGroup(optimizers, schedules)
        self.fast = bool(settings.get("fast", True))
        self.use_bc_loss = bool(settings.get("use_bc_loss", False))
        self.coefficients = {
            "entropy_loss": float(settings.get("ent_coef", 0)),
            "v_loss": float(settings.get("vf_coef", 0)),
            "bc_loss": float(settings.get("bc_loss_coeff", 0)),
        }
        self.max_grad_norm = settings.get("max_grad_norm", None)
        self.augment = RandomShiftsAug(pad=4) if settings.get("augment", False) else None
        self.batch_rows = int(settings.get("logprob_batch_size", 1000))  # images looked at together between updates
        self.grad_accumulate = int(settings.get("grad_accumulate", 1))
        self.pending = {
            name: [tf.Variable(tf.zeros_like(v), trainable=False) for v in variables]
            for name, variables in self.trained.items()
            if self.grad_accumulate > 1
        }
        self.data: dict[str, tf.Tensor] = {}
        self.compile()

    def modules(self) -> dict[str, Any]:
        """Returns what is trained, each with an optimizer and a schedule of its own."""
        return {"actor": self.policy.actor_ft, "critic": self.policy.critic}

    def compile(self) -> None:
        """(Re)builds the actor, which decides while collecting, and the compiled functions."""
        p, self.actor = self.policy, actor_for(self.policy, self.fast)
        self._values = compiled(lambda *obs: tf.reshape(p.critic(_observation(*obs)), [-1]), reduce_retracing=True)
        self._seen_log_probs = compiled(lambda actions, *obs: p.log_probs(_observation(*obs), actions)[0])
        self._step = compiled(self._minibatch_step)
        self.loss_names: tuple[str, ...] = ()  # known once `_step` has been traced

    def update(
        self,
        rollout: Rollout,
        rng: Rng,
        train_actor: bool,
        stop: Callable[[], None] = lambda: None,
        check: Callable[[Mapping[str, float]], None] = lambda losses: None,
    ) -> dict[str, Any]:
        """Trains on a rollout.

        Only termination (not truncation) cuts the bootstrap, as in the reference, whose results rest on it.

        Args:
            rng: the source of all draws.
            train_actor: False while only the critic warms up.
            stop, check: called before each minibatch, and after it with its losses; may raise.

        Returns:
            scalars for the metrics; and arrays of what was computed: "losses" of the minibatches by name, "values",
            "advantages", "returns" [S,E] and "log_probs" [N,...].
        """
        settings, last = self.settings, rollout.last_observations
        obs, decisions = _samples(rollout.observations), _samples(rollout.decisions)
        state, rgb = obs["state"].astype(floatx()), self.shifted(obs.get("rgb"), rng)
        values = self.values(state, rgb).reshape(rollout.rewards.shape)
        log_probs = self.old_log_probs(state, decisions, rng, rgb)
        last_rgb = last.get("rgb") if not self.SHIFTS_LAST else self.shifted(last.get("rgb"), rng)
        advantages, returns = gae(
            rollout.rewards,
            values,
            self.values(last["state"].astype(floatx()), last_rgb),
            rollout.terminated,
            float(settings["gamma"]),
            float(settings.get("gae_lambda", 0.95)),
            float(settings.get("reward_scale_const", 1)),
        )
        targets, expected, gains = (x.reshape(-1).astype(floatx()) for x in (returns, values, advantages))
        n_rows = self.load(state, decisions[self.SAMPLES], targets, expected, gains, log_probs, rgb)
        losses = self.minibatches(n_rows, rng, train_actor, stop, check)
        details = {"losses": losses, "values": values, "advantages": advantages, "returns": returns}
        return _summary(losses, targets, expected) | details | {"log_probs": log_probs}

    def values(self, state: np.ndarray, rgb: np.ndarray | None = None) -> np.ndarray:
        """Returns state values [N] of observations [N,To,O]."""
        state = tf.constant(state, self.policy.dtype)
        if rgb is None:
            return self._values(state).numpy()
        return in_parts(lambda s, r: self._values(s, tf.constant(r)).numpy(), self.batch_rows, state, rgb)

    def shifted(self, rgb: np.ndarray | None, rng: Rng) -> np.ndarray | None:
        """Shifts images [N,To,C,Hi,Wi] at random, each by its own number of pixels, if `train.augment` says so."""
        return rgb if rgb is None or self.augment is None else shift_images(self.augment, rgb, rng, self.batch_rows)

    def old_log_probs(
        self, state: np.ndarray, decisions: Mapping[str, np.ndarray], rng: Rng, rgb: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns log-probabilities [N,...] of a rollout under the policy that collected it.

        They were captured while sampling; where images were shifted since, they are computed now.
        """
        if rgb is None or self.augment is None:
            return decisions["log_probs"]
        state, samples = (tf.constant(x, self.policy.dtype) for x in (state, decisions[self.SAMPLES]))
        return in_parts(lambda s, c, r: self.seen_log_probs(s, c, tf.constant(r)), self.batch_rows, state, samples, rgb)

    def seen_log_probs(self, state: Array, samples: Array, rgb: Array) -> np.ndarray:
        """Returns log-probabilities [N,...] of samples [N,...], as those captured while sampling."""
        return self._seen_log_probs(samples, state, rgb).numpy()

    def load(
        self,
        state: np.ndarray,
        samples: np.ndarray,
        returns: np.ndarray,
        values: np.ndarray,
        advantages: np.ndarray,
        log_probs: np.ndarray,
        rgb: np.ndarray | None = None,
    ) -> int:
        """Takes a rollout of N samples; returns the number of rows that minibatches index.

        Args:
            state, rgb: the observations.
            samples: of the decisions the part named by `SAMPLES`: chunks [N,H,A], or chains [N,F+1,H,A].
            returns, values, advantages: [N].
            log_probs: of `old_log_probs`.
        """
        arrays = {
            "state": state,
            self.SAMPLES: samples,
            "returns": returns,
            "values": values,
            "advantages": advantages,
            "old_log_prob": self.reduce(log_probs),
        }
        self.data = {name: tf.constant(array, self.policy.dtype) for name, array in arrays.items()}
        if rgb is not None:
            self.data["rgb"] = tf.constant(rgb)
        return len(state) * self.rows_per_sample

    @property
    def rows_per_sample(self) -> int:
        """Returns how many rows of minibatches one sample makes, which stand one after the other."""
        return 1

    def reduce(self, log_probs: np.ndarray) -> Any:
        """Brings old log-probabilities [N,...] into the form that the loss takes."""
        return log_probs

    # ---------- minibatches ----------

    def minibatches(
        self,
        n_rows: int,
        rng: Rng,
        train_actor: bool,
        stop: Callable[[], None],
        check: Callable[[Mapping[str, float]], None],
    ) -> dict[str, list[float]]:
        """Goes through all rows in each epoch. Arguments as of `update`. Returns the minibatches' losses by name."""
        size, target_kl = int(self.settings["batch_size"]), self.settings.get("target_kl", None)
        losses: dict[str, list[float]] = defaultdict(list)
        for _ in range(int(self.settings["update_epochs"]) if n_rows else 0):
            permutation = rng.permutation(n_rows)
            for number, rows in enumerate(self.batches(permutation, size)):
                stop()
                values = self.minibatch(rows, train_actor, number, self.draw(rng, len(rows)))
                check(values)
                for name, value in values.items():
                    losses[name].append(value)
                if target_kl is not None and values["approx_kl"] > target_kl and self.may_stop(train_actor, number):
                    return losses
        return losses

    def may_stop(self, train_actor: bool, number: int) -> bool:
        """Says whether a large KL divergence ends the update here: with accumulated gradients after an actor's step."""
        return self.grad_accumulate == 1 or (train_actor and self.complete(number))

    def batches(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """Deals rows [N] to minibatches [B]; what is left over is dropped."""
        return [rows[i * size : (i + 1) * size] for i in range(max(1, len(rows) // size))]

    def draw(self, rng: Rng, rows: int) -> Any:
        """Draws what the update of a minibatch of that many rows needs; None if nothing."""
        shape = self.policy.bc_noise_shape(rows) if self.use_bc_loss else None
        return None if shape is None else rng.normal(shape, floatx())

    def minibatch(self, rows: np.ndarray, train_actor: bool, number: int, draws: Any = None) -> dict[str, float]:
        """Updates once.

        Args:
            rows: [B] indices of rows.
            train_actor: False while only the critic warms up.
            number: of this minibatch within its epoch.
            draws: of `draw`.

        Returns:
            the parts of the loss by name, as floats.
        """
        self.actor.weights_changed()
        noise = None if draws is None else tf.constant(draws, self.policy.dtype)
        stepped = tuple(name for name in self.trained if self.steps(name, train_actor, number))
        losses = self._step(tf.constant(rows, tf.int32), self.data, noise, stepped, self.complete(number))
        return dict(zip(self.loss_names, losses.numpy().tolist(), strict=True))

    def steps(self, name: str, train_actor: bool, number: int) -> bool:
        """Says whether that optimizer takes a step in this minibatch."""
        return self.complete(number) and (name == "critic" or train_actor)

    def complete(self, number: int) -> bool:
        """Says whether `train.grad_accumulate` gradients are added up; what an epoch leaves over waits for the next."""
        return (number + 1) % self.grad_accumulate == 0

    def _minibatch_step(
        self, rows: Array, data: dict[str, Array], draws: Any, stepped: tuple[str, ...], complete: bool
    ) -> Array:
        with backward_in(self.settings.get("precision")), folding(self.fast):
            losses, grads = self.shared_gradients(rows, data, draws)
        for name, totals in self.pending.items():
            grads[name] = [
                g if g is None else total.assign_add(g) for total, g in zip(totals, grads[name], strict=True)
            ]
        self.take_steps(stepped, losses, grads)
        for total in sum(self.pending.values(), []) if complete else []:
            total.assign(tf.zeros_like(total))
        self.loss_names = tuple(losses)
        return tf.stack([tf.cast(value, tf.float64) for value in losses.values()])

    def take_steps(self, names: tuple[str, ...], losses: Losses, grads: Gradients) -> None:
        """Steps those optimizers along the gradients of a minibatch; compiled."""
        for name in names:
            if name in self.CLIPPED and self.max_grad_norm is not None:
                grads[name], _ = clip_by_global_norm(grads[name], self.max_grad_norm)
            self.optimizers.apply(name, grads[name])

    def gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Losses, Gradients]:
        """Returns the parts of the loss of rows [B] and the gradients by name; compiled as part of the step."""
        with tf.GradientTape() as tape:
            losses = self.losses(rows, data, draws)
            weighted = [c * losses[name] for name, c in self.coefficients.items() if name in losses]
            total = losses["pg_loss"] + tf.add_n(weighted)
        names = list(self.trained)
        grads = tape.gradient(total, [self.trained[n] for n in names])
        return losses, dict(zip(names, grads, strict=True))

    def losses(self, rows: Array, data: dict[str, Array], draws: Any) -> Losses:
        """Returns the parts of the loss of rows [B], straight from the algorithm's definition."""
        names = (self.SAMPLES, "returns", "values", "advantages", "old_log_prob")
        columns = (tf.gather(data[name], rows) for name in names)
        return self.policy.loss(observations(data, rows), *columns, use_bc_loss=draws is not None, bc_noise=draws)

    # ---------- between iterations ----------

    def end_iteration(self, train_actor: bool) -> None:
        """Advances the learning-rate schedules (the actor's only after the critic's warm-up)."""
        self.optimizers.advance(None if train_actor else ("critic",))

    @property
    def learning_rates(self) -> dict[str, float]:
        """Returns the present rates by name: actor, critic, and what else is trained."""
        return self.optimizers.learning_rates

    def watched(self) -> dict[str, float]:
        """Returns what else belongs into the metrics of an iteration."""
        return {}

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns optimizer moments for a checkpoint, under the names of the variables they belong to."""
        pending = {f"pending.{k}.{i}": v.numpy() for k, totals in self.pending.items() for i, v in enumerate(totals)}
        return self.optimizers.tensors() | pending

    def state(self) -> dict[str, Any]:
        """Returns what else a checkpoint needs, as JSON values."""
        return self.optimizers.state()

    def before_weights(self, state: Mapping[str, Any]) -> None:
        """Makes room, as `state` says, for the weights of a checkpoint that are to be loaded."""

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Takes back what `tensors` and `state` returned; weights are loaded apart."""
        self.optimizers.restore(tensors, state)
        for name, totals in self.pending.items():
            for i, total in enumerate(totals):
                total.assign(tensors[f"pending.{name}.{i}"])
        self.compile()


def in_parts(f: Callable[..., np.ndarray], size: int, *columns: Any) -> np.ndarray:
    """Joins what f makes of columns [N,...], `size` rows at a time."""
    cuts = [slice(i, i + size) for i in range(0, len(columns[0]), size)]
    return np.concatenate([f(*(column[cut] for column in columns)) for cut in cuts])


def shift_images(augment: RandomShiftsAug, rgb: np.ndarray, rng: Rng, size: int) -> np.ndarray:
    """Shifts images [N,To,C,Hi,Wi], each by its own number of pixels; `size` of them together."""
    images = rgb.reshape(-1, *rgb.shape[2:])
    shifts = rng.integers(0, 2 * augment.pad + 1, (len(images), 1, 1, 2))
    shifted = in_parts(lambda x, by: augment(tf.constant(x), tf.constant(by)).numpy(), size, images, shifts)
    return shifted.reshape(rgb.shape)


def observations(data: Mapping[str, Array], rows: Array) -> Obs:
    """Gathers the observations of rows [B]."""
    return {name: tf.gather(data[name], rows) for name in ("state", "rgb") if name in data}


def _observation(state: Array, rgb: Array | None = None) -> Obs:
    """Returns what networks take."""
    return {"state": state} if rgb is None else {"state": state, "rgb": rgb}


def _samples(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reshapes [S,E,...] to [N,...]."""
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in arrays.items()}


def _summary(losses: Mapping[str, list[float]], returns: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """Returns the last minibatch's losses, and how well the values [N] explained the returns [N]."""
    variance = np.var(returns)
    summary: dict[str, Any] = {name: losses[name][-1] for name in losses}
    summary["clipfrac"] = float(np.mean(losses["clipfrac"])) if losses else None
    summary["explained_variance"] = math.nan if variance == 0 else float(1 - np.var(returns - values) / variance)
    summary["updates"] = len(losses.get("pg_loss", ()))
    return summary
