"""Wide collecting: actors of a cluster hold the policy, and return whole rollouts of their environments.

The driver sends weights once an iteration, and decides nothing in between: for fast simulators on many machines. Each
actor draws from a source of its own, keyed by seed, iteration and its first environment; so the same actors give the
same rollouts, however often they die, and another number of them gives others of the same distribution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_rl.cluster.remote import joined
from diffusion_rl.config.compose import merged
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.envs.interface import Observations
from diffusion_rl.envs.make import EnvPlan
from diffusion_rl.interop.torch_names import load_state_dict
from diffusion_rl.policies.acting import actor_for
from diffusion_rl.training.evaluation import deciding
from diffusion_rl.training.policy_files import build_policy
from diffusion_rl.training.rollout import Rollout, collect

ANNEALED = ("ft_denoising_steps", "actor_is_network", "sampling_floor")  # what of a trainer's state changes samples


@dataclasses.dataclass(frozen=True)
class CollectingPlan(EnvPlan):
    """A plan whose environments come with the policy that acts in them.

    Attributes:
        settings: the whole configuration of the run, as plain values.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, plan: EnvPlan, settings: Mapping[str, Any]) -> CollectingPlan:
        """Returns a plan with a policy."""
        fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(EnvPlan)}
        return cls(**fields, settings=settings)

    def build(self) -> Any:
        return CollectingEnv(super().build(), self.settings)


class CollectingEnv:
    """Vector environments that collect by themselves; in all else they are those they are made of."""

    def __init__(self, venv: Any, settings: Mapping[str, Any]):
        self._venv, self._settings = venv, settings
        self._policy: Any = None
        self._actor: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._venv, name)

    def collect(
        self, weights: Any, key: Sequence[int], n_steps: int, observations: Observations, firsts: np.ndarray
    ) -> Rollout:
        """Acts for `n_steps` chunks.

        Args:
            weights: of the policy, by name, as Ray stores them.
            key: of the draws.
            observations: those to go on from {key: [E,To,...]};  firsts: [E], 1 where they begin an episode.
        """
        import ray

        self._build_policy()
        load_state_dict(self._policy, ray.get(weights))
        self._actor.weights_changed()
        decide = deciding(self._actor, NoiseSource(key), deterministic=False)
        return collect(self._venv, decide, n_steps, observations, firsts, self._venv.act_steps)

    def _build_policy(self) -> None:
        if self._actor is None:
            from diffusion_rl.core.threads import configure_threads

            configure_threads()
            settings = self._settings
            self._policy = build_policy(merged(settings, {}), int(settings["seed"]))
            self._actor = actor_for(self._policy, bool(settings["train"]["fast"]))


class WideCollector:
    """Collects at all actors of a vector environment.

    Args:
        venv: a `RemoteVectorEnv`, made of `CollectingPlan`s.
        trainer: whose policy acts. Raises UserError later if more than weights changes in it.
    """

    def __init__(self, venv: Any, trainer: Any, seed: int):
        self.venv, self.trainer, self.seed = venv, trainer, seed
        self._facts = self._unchanging()

    def _unchanging(self) -> dict[str, Any]:
        state = self.trainer.state()
        return {key: state.get(key) for key in ANNEALED}

    def collect(
        self,
        iteration: int,
        weights: Mapping[str, np.ndarray],
        n_steps: int,
        observations: Observations,
        firsts: np.ndarray,
    ) -> Rollout:
        """Acts for `n_steps` chunks in all environments; arguments as of `CollectingEnv.collect`."""
        import ray

        if self._unchanging() != self._facts:
            raise UserError("env.collect=wide sends weights alone, but this policy anneals: take env.collect=exact")
        stored = ray.put(dict(weights))
        parts = self.venv.call(
            "collect",
            [
                (stored, (self.seed, iteration, rows.start), n_steps, _of(observations, rows), firsts[rows])
                for rows in self.venv.rows
            ],
        )
        return side_by_side(parts)


def side_by_side(parts: Sequence[Rollout]) -> Rollout:
    """Joins rollouts of different environments, side by side."""
    told = [part.successes for part in parts]
    silent = [np.zeros(part.rewards.shape, bool) for part in parts]
    anyone = any(one is not None for one in told)
    return Rollout(
        observations=joined([part.observations for part in parts], axis=1),
        last_observations=joined([part.last_observations for part in parts], axis=0),
        rewards=np.concatenate([part.rewards for part in parts], axis=1),
        terminated=np.concatenate([part.terminated for part in parts], axis=1),
        firsts=np.concatenate([part.firsts for part in parts], axis=1),
        decisions=joined([part.decisions for part in parts], axis=1),
        successes=np.concatenate([b if a is None else a for a, b in zip(told, silent, strict=True)], axis=1)
        if anyone
        else None,
    )


def _of(observations: Observations, rows: slice) -> Observations:
    return {key: value[rows] for key, value in observations.items()}
