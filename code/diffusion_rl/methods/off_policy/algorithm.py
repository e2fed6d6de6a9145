"""What the off-policy loop asks of an algorithm, and the few formulas that several of them share.

An algorithm is a class: a policy (`draw_action`, `act`) with

    parts        what is trained, and by which settings
    experience   how its data are kept
    phases       which updates an iteration consists of
    draw         everything random of one update, in the order of the PyTorch reference
    update       one update: losses, gradient steps, target networks; compiled, many of them in one call

and what it says of itself (literals, which `config.declared` reads without importing the class):

    KIND         kind of its checkpoints
    LABEL        its name in papers and so in figures; left out: the run's name
    TRAIN_KEYS   the keys of `train` that it reads beside those of the loop, with spaces between them; "actor" stands
                 for actor_lr, actor_lr_scheduler and actor_weight_decay
    EXPORTABLE   False: it acts by more than its policy, so that no export would act as it does
    ACTS_WITH    the part of its checkpoints that acts; left out: the policy's network
    CRITICS      names of its critics and of their target; left out: critic and critic_target

`settings` is the `train` node of the configuration throughout, `rng` the source of random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from diffusion_rl.core.ema import average_into
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.methods.off_policy.buffers import Draws
from diffusion_rl.networks.layers import Array, variables_of

Settings = Mapping[str, Any]


class Part(NamedTuple):
    """Variables with an optimizer of their own.

    Attributes:
        prefix: of its settings, `<prefix>lr`, `<prefix>weight_decay` and `<prefix>lr_scheduler`.
        constant: no weight decay, and the rate stays as it is.
    """

    variables: list[tf.Variable]
    prefix: str
    constant: bool = False


class Phase(NamedTuple):
    """`n` updates by one method of the algorithm.

    Attributes:
        update, draw: names of the methods.
        train_actor: False while only critics are trained.
        before: name of a method that is given the buffers first.
    """

    n: int
    train_actor: bool = True
    update: str = "update"
    draw: str = "draw"
    before: str | None = None


class Progress(NamedTuple):
    """How far the loop is.

    Attributes:
        itr: the iteration, from 0.
        transitions: collected in it.
        rows: in the replay buffer.
        first_episode: length of the first whole episode of the iteration; 0 without one.
    """

    itr: int
    transitions: int
    rows: int
    first_episode: int


@dataclass(frozen=True)
class Experience:
    """How the loop keeps an algorithm's experience and collects it.

    Attributes:
        fields: of `Transitions`.
        offline_fields: of the offline data set's rows, kept apart; empty: there is none.
        starts_with_dataset: the replay buffer begins with the offline data instead.
        counts_steps: `buffer_size` counts steps of all environments together, not transitions.
        acts_on_last: after a truncation the policy decides once on the old episode's last observation (in the reference
            an array that is shared by mistake, quirk 65).
        whole_episodes: nothing is kept but the complete episodes of the present iteration, as whole chunks.
        n_episodes: an iteration collects so many episodes instead of `n_steps` steps; 0: it collects nothing.
        counts_episodes: an evaluation lasts `n_eval_episode` episodes instead of `n_steps` steps.
        explores: uniformly random actions in the first `n_explore_steps` iterations.
        evaluates_at_once: evaluations begin in iteration `n_explore_steps`, not after it.
        stores_rest: what is kept as the action is not what is executed but what the policy decides behind it.
    """

    fields: tuple[str, ...] = ("obs", "actions", "next_obs", "rewards", "terminated")
    offline_fields: tuple[str, ...] = ()
    starts_with_dataset: bool = False
    counts_steps: bool = False
    acts_on_last: bool = False
    whole_episodes: bool = False
    n_episodes: int | None = None
    counts_episodes: bool = False
    explores: bool = False
    evaluates_at_once: bool = False
    stores_rest: bool = False


class OffPolicy:
    """A mixin of policies: what holds unless an algorithm says otherwise."""

    KIND: str  # of checkpoints
    CRITICS = ("critic", "critic_target")  # names of the trained critics and of their target
    actor: Any

    def experience(self, settings: Settings) -> Experience:
        """Says how the data are kept."""
        return Experience()

    def parts(self, settings: Settings) -> dict[str, Part]:
        """Returns what is trained: actor and critic."""
        modules = {"actor": self.actor, "critic": getattr(self, self.CRITICS[0])}
        return {name: Part([v for v in variables_of(m) if v.trainable], f"{name}_") for name, m in modules.items()}

    def phases(self, settings: Settings, progress: Progress) -> list[Phase]:
        """Plans updates that draw each new transition `replay_ratio` times; the actor's after the warm-up."""
        n = int(progress.transitions / settings["batch_size"] * settings["replay_ratio"])
        return [Phase(n, progress.itr >= settings["n_critic_warmup_itr"])]

    def double_q_error(self, batch: Transitions, next_actions: Array, gamma: float) -> Array:
        """Returns the Bellman error, a scalar, of two critics in one with r + gamma min_i Q_i'(o', a'), a' [B,H,A]."""
        critics, target = (getattr(self, name) for name in self.CRITICS)
        next_q = tf.minimum(*target({"state": batch.next_obs}, next_actions))
        return bellman_error(critics({"state": batch.obs}, batch.actions), batch, next_q, gamma)

    def update_target_critic(self, tau: float) -> None:
        """Moves the critics' target towards them."""
        critics, target = (getattr(self, name) for name in self.CRITICS)
        follow(target, critics, tau)

    def watched(self) -> dict[str, float]:
        """Returns numbers for the metrics beside the losses."""
        return {}


# ---------- formulas ----------


def bellman_error(q: tuple[Array, ...], batch: Transitions, next_value: Array, gamma: float) -> Array:
    """Sums over critics [B] the mean squared distance to r + gamma (1 - terminated) V(o'), which has no gradient."""
    target = tf.stop_gradient(batch.rewards + gamma * next_value * (1.0 - batch.terminated))
    return tf.add_n([tf.reduce_mean(tf.square(value - target)) for value in q])


def follow(target: Any, source: Any, tau: float) -> None:
    """Moves a target towards its source, weight by weight: target <- (1 - tau) target + tau source."""
    average_into(variables_of(target), variables_of(source), 1.0 - tau)


def mixed(data: Any, draws: Draws) -> Transitions:
    """Returns a batch of demonstrations (`offline_rows`) followed by replayed transitions (`rows`)."""
    halves = zip(data.offline.at(draws["offline_rows"]), data.online.at(draws["rows"]), strict=True)
    return Transitions(*(None if a is None else tf.concat([a, b], axis=0) for a, b in halves))
