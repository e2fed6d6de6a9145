"""A vector environment whose simulators run at Ray actors, anywhere in a cluster: the same numbers as on one machine.

Every environment draws from its own seed, so it gives the same wherever it is and whatever others share its actor. The
policy stays with the driver: a chunk step is one message to every actor and one back. Shape letters: E environments.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_rl.cluster.session import ClusterSettings, connect, cores
from diffusion_rl.cluster.shard import Actors, Shard
from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.interface import Observations, StepResult, require_one_each
from diffusion_rl.envs.make import EnvPlan

log = logging.getLogger(__name__)


class RemoteVectorEnv:
    """E environments at actors; lost ones are replaced, and go on as if nothing had happened.

    Args:
        plan: of all environments.
        settings: of the cluster.
        actors: start the processes; None: as the settings say.

    Attributes:
        rows: which environments each actor has.

    Raises:
        UserError: there is no such cluster, or the environments cannot be built in it.
    """

    def __init__(self, plan: EnvPlan, settings: ClusterSettings, actors: Actors | None = None):
        if plan.request.window:
            raise UserError("env.render=true shows a window on this machine: leave env.cluster=ray out")
        ray = connect(settings)
        self.n_envs, self.act_steps = len(plan.request.seeds), plan.request.act_steps
        self.lost, self.repeated = 0, 0  # actors, calls; since the last `measured`
        n_actors = min(self.n_envs, settings.actors or cores(ray))
        bounds = np.linspace(0, self.n_envs, n_actors + 1).astype(int).tolist()
        self.rows = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        self._actors = Actors(ray, settings.spares) if actors is None else actors
        self._shards: list[Shard] = []
        try:
            # an actor has a core: threads of its environments are more actors
            self._shards = [Shard(plan.part(rows, threads=1), self._actors, self._tell) for rows in self.rows]
            for shard in self._shards:
                shard.build()
            facts = [shard.built() for shard in self._shards]
            self._actors.keep_spares()
        except BaseException:
            self.close()
            raise
        self.obs_spec, self.action_dim, self.restorable = facts[0][:3]
        hosts = len({fact.host for fact in facts})
        log.info("%d environments at %d actors on %d machines", self.n_envs, n_actors, hosts)

    def _tell(self, line: str, repeated: int) -> None:
        self.lost += 1
        self.repeated += repeated
        log.warning(line)

    def measured(self) -> dict[str, int]:
        """Returns what to add to the metrics of an iteration: actors lost since the last one, and calls repeated."""
        values = {"actors_lost": self.lost, "calls_repeated": self.repeated}
        self.lost = self.repeated = 0
        return values

    # ---------- the interface ----------

    def call(self, method: str, arguments: Sequence[tuple]) -> list[Any]:
        """Calls a method of the environments of each actor, with arguments of its own; returns their answers."""
        for shard, args in zip(self._shards, arguments, strict=True):
            shard.ask(method, *args)
        return [shard.answer(reply) for shard, reply in zip(self._shards, self._at_once(), strict=True)]

    def _at_once(self) -> list[Any]:
        """Returns the replies of all actors, fetched together; Nones where one is late or lost, which its shard finds
        out."""
        ray, pending = self._actors.ray, [shard.pending for shard in self._shards]
        patience = min(shard.patience() for shard in self._shards)
        _, late = ray.wait(pending, num_returns=len(pending), timeout=patience)
        if not late:
            with contextlib.suppress(ray.exceptions.RayError):
                return ray.get(pending)
        return [None] * len(pending)

    def seed(self, seeds: Sequence[int]) -> None:
        """Seeds environment i with seeds[i]; it takes effect with the next reset."""
        require_one_each("seeds", seeds, self.n_envs)
        self.call("seed", [(list(seeds[rows]),) for rows in self.rows])

    def reset(self, options: Sequence[dict[str, Any]] | None = None) -> Observations:
        """Begins new episodes everywhere."""
        options = [{}] * self.n_envs if options is None else options
        require_one_each("options", options, self.n_envs)
        return joined(self.call("reset", [(list(options[rows]),) for rows in self.rows]))

    def step(self, actions: np.ndarray) -> StepResult:
        """Executes chunks [E,Ta,A]; all actors step at the same time."""
        actions = np.asarray(actions)
        if actions.ndim != 3 or actions.shape[::2] != (self.n_envs, self.action_dim):
            raise ValueError(f"actions have shape {actions.shape}, expected ({self.n_envs}, Ta, {self.action_dim})")
        results = self.call("step", [(actions[rows],) for rows in self.rows])
        rewards, terminated, truncated = (
            np.concatenate([getattr(result, name) for result in results])
            for name in ("rewards", "terminated", "truncated")
        )
        observations = joined([result.observations for result in results])
        return StepResult(observations, rewards, terminated, truncated, _joined_infos(results))

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns everything needed to continue bit for bit, here or without a cluster, if `restorable`."""
        return joined(self.call("get_state", [()] * len(self.rows))) if self.restorable else {}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continues where `get_state` was taken.

        Raises:
            UserError: it is the state of another number of environments, or of other ones.
        """
        rows = {key: len(value) for key, value in state.items()}
        for key, n in rows.items():
            if n != self.n_envs:
                raise UserError(f"saved state of the environments: {key} has {n} rows, there are {self.n_envs}")
        self.call("set_state", [({key: value[cut] for key, value in state.items()},) for cut in self.rows])

    def close(self) -> None:
        """Ends all actors."""
        for shard in self._shards:
            shard.close()
        self._actors.close()
        self._shards = []


def joined(parts: Sequence[Mapping[str, np.ndarray]], axis: int = 0) -> dict[str, np.ndarray]:
    """Joins arrays [...] of different environments by name; axis: that of the environments."""
    return {key: np.concatenate([part[key] for part in parts], axis=axis) for key in parts[0]}


def _joined_infos(results: Sequence[StepResult]) -> dict[str, Any]:
    """Joins infos; where only some of the shards have something to say, the others say what it means to say nothing."""
    infos: dict[str, Any] = {}
    for key in {key for result in results for key in result.infos}:
        values = [r.infos.get(key, _unsaid(key, r)) for r in results]
        infos[key] = joined(values) if isinstance(values[0], dict) else np.concatenate(values)
    return infos


def _unsaid(key: str, result: StepResult) -> Any:
    return result.observations if key == "final_observations" else np.zeros(len(result.rewards), bool)
