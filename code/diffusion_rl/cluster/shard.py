"""Some environments of a run at an actor, which another one replaces where it is lost: no bit of the run changes."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_rl.cluster.session import PLACING_SECONDS, cores
from diffusion_rl.cluster.simulators import Call, Facts, Point, Reply, Simulators
from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.interface import SimulatorDied, StepResult
from diffusion_rl.envs.make import EnvPlan

log = logging.getLogger(__name__)

KEPT_EVERY = 25  # steps from one point to return to, to the next
LONGEST_JOURNAL = 20_000  # calls that are repeated at the most
ATTEMPTS = 10  # actors that may be lost within one call
NEW_SEEDS = 1_000_003  # from the seeds of environments to those with which they begin anew
LATE, LATE_SECONDS = 5.0, 2.0  # times the usual time of a call, and seconds, after which a spare actor joins in
COMPARED = 10  # calls of which the usual time is known


class Actors:
    """Starts processes that simulate; each takes a core of the cluster for itself as long as there are any.

    Args:
        ray: the package, connected.
        spares: processes that are started before they are needed.
    """

    def __init__(self, ray: Any, spares: int = 0):
        self.ray = ray
        self._make = ray.remote(Simulators)
        self.n_spares = spares
        self._spares: list[Any] = []
        self._with_core: list[Any] = []  # actors that have one for themselves

    def start(self, shares: bool | None = None) -> Any:
        """Begins to start an actor, on whichever machine has room.

        Args:
            shares: take no core of its own; None: if all are taken.
        """
        shares = len(self._with_core) >= cores(self.ray) if shares is None else shares
        options = {"num_cpus": int(not shares), "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        actor = self._make.options(**options).remote()
        self._with_core += [] if shares else [actor]
        return actor

    def placed(self, actor: Any) -> Any:
        """Waits until an actor runs; returns it, or one that shares a core where it found none of its own."""
        if not self.ray.wait([actor.here.remote()], timeout=PLACING_SECONDS)[0]:
            self.end(actor)
            actor = self.start(shares=True)
        return actor

    def keep_spares(self) -> None:
        """Starts as many actors as are kept ready."""
        self._spares += [self.start(shares=True) for _ in range(self.n_spares - len(self._spares))]

    def take(self) -> Any:
        """Returns an actor that runs already, or else a new one."""
        if not self._spares:
            return self.placed(self.start())
        actor = self._spares.pop(0)
        self.keep_spares()
        return actor

    def end(self, actor: Any) -> None:
        """Ends an actor at once."""
        self._with_core = [other for other in self._with_core if other is not actor]
        self.ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """Ends the spare ones."""
        while self._spares:
            self.end(self._spares.pop())


class Shard:
    """The environments of one actor, seen from the driver.

    Args:
        plan: of these environments.
        actors: starts them.
        tell: takes a line about each actor that is lost or late, and how many calls others repeat.
    """

    def __init__(self, plan: EnvPlan, actors: Actors, tell: Callable[[str, int], None]):
        self.plan, self._actors, self._tell = plan, actors, tell
        self._ray = actors.ray
        self._point: Point | None = Point()  # to return to; None: there is none
        self._journal: list[Call] = []  # calls since
        self._steps = 0  # since a point was asked for
        self._begun = 0  # how often episodes that cannot be repeated have given way to new ones
        self._runs: dict[Any, Any] = {}  # answers under way, and the actors that make them
        self._times: deque[float] = deque(maxlen=50)
        self._asked_at = time.monotonic()
        self._seen: Any = None  # the last observations
        self._actor = actors.start()
        self.facts = Facts({}, 0, False, "the start", 0)

    @property
    def rows(self) -> int:
        """Returns how many environments there are."""
        return len(self.plan.request.seeds)

    def build(self) -> None:
        """Lets its actor build the environments; `built` waits for them."""
        self._actor = self._actors.placed(self._actor)
        self._runs = {self._actor.build.remote(self.plan): self._actor}

    def built(self) -> Facts:
        """Waits until the environments are there. Raises UserError where they cannot be built."""
        self.facts = self._answered(self._built_anew)
        return self.facts

    def _built_anew(self) -> None:
        self._actor = self._actors.take()
        self._runs = {self._actor.build.remote(self.plan): self._actor}

    # ---------- calls ----------

    def ask(self, method: str, *arguments: Any) -> None:
        """Sends a call; `answer` gives what comes of it."""
        if len(self._journal) >= LONGEST_JOURNAL:
            self._point, self._journal = None, []
        self._journal.append((method, arguments))
        self._asked_at = time.monotonic()
        self._runs = {self._actor.call.remote(method, arguments, self._keeps()): self._actor}

    @property
    def pending(self) -> Any:
        """Returns where Ray will put the answer to the last call."""
        return next(iter(self._runs))

    def answer(self, reply: Reply | None = None) -> Any:
        """Waits for the answer to the last call, from whichever actor gives it.

        Args:
            reply: that answer, where it is known already.

        Raises:
            UserError: the environments fail, or actors are lost again and again.
        """
        reply = self._answered(self._replace) if reply is None else reply
        self._times.append(time.monotonic() - self._asked_at)
        self._note(reply)
        if self._journal and self._journal[-1][0] in ("get_state", "seed") and self.facts.restorable:
            self._journal.pop()
        return reply.value

    def _keeps(self) -> bool:
        """Returns whether the answer to the last call of the journal should bring a point to return to."""
        self._steps += 1
        return self._journal[-1][0] in ("reset", "seed", "collect") or self._steps % KEPT_EVERY == 0

    def _note(self, reply: Reply) -> None:
        """Takes the point of a reply: what was before it need not be repeated."""
        method, arguments = self._journal[-1]
        if method == "set_state":
            self._point, self._journal = Point(state=arguments[0]), []
        elif reply.point is not None and reply.point.state is not None:
            self._point, self._journal = reply.point, []
        elif reply.point is not None:
            self._point = reply.point if reply.point.random is not None else None
            self._journal = self._journal[-1:]
        if method in ("reset", "step"):
            self._seen = getattr(reply.value, "observations", reply.value)

    # ---------- faults ----------

    def _answered(self, replace: Callable[[], Any]) -> Any:
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                made_up = replace() if reason else None
                return self._first() if made_up is None else made_up
            except self._losses() as loss:
                self._raise_fault(loss)
                for actor in self._runs.values():
                    self._actors.end(actor)
                reason = self._reason(loss)
                repeated = len(self._journal) if self._point is not None else 0
                then = f"others repeat {repeated} calls" if self._point is not None else "new episodes begin"
                self._tell(f"simulators at {self.facts.host} were lost ({reason}): {then}", repeated)
        name = self.plan.request.name
        raise UserError(f"{ATTEMPTS} actors in a row were lost with environments of {name} ({reason}): see Ray's logs")

    def _first(self) -> Any:
        """Waits for the first answer that comes. A spare actor races one that is late."""
        limit = self.limit
        while True:
            until = self._asked_at + (self.patience() if len(self._runs) == 1 else limit)
            ready, _ = self._ray.wait(list(self._runs), timeout=max(0.0, until - time.monotonic()))
            if ready:
                self._actor = self._runs.pop(ready[0])
                for late in self._runs.values():
                    self._actors.end(late)
                self._runs = {ready[0]: self._actor}
                return self._ray.get(ready[0])
            if time.monotonic() - self._asked_at >= limit:
                raise TimeoutError(f"no answer for {limit:g} s; see env.worker_timeout")
            self._race()

    @property
    def limit(self) -> float:
        """Returns seconds that an answer may take, if another actor has to repeat all calls for it."""
        usual = statistics.median(self._times) if self._times else 0.0
        return self.plan.request.worker_timeout + PLACING_SECONDS + 3 * usual * len(self._journal)

    def patience(self) -> float:
        """Returns seconds after which an answer is late, where there are spare actors and calls to compare it with."""
        limit = self.limit
        if self._actors.n_spares == 0 or len(self._times) < COMPARED or self._point is None:
            return limit
        return min(limit, max(LATE_SECONDS, LATE * statistics.median(self._times)))

    def _race(self) -> None:
        actor = self._actors.take()
        self._tell(f"simulators at {self.facts.host} are late: a spare actor joins in", 0)
        self._runs[actor.repeat.remote(self.plan, self._point, self._journal, self._keeps())] = actor

    def _losses(self) -> tuple[type[BaseException], ...]:
        errors = self._ray.exceptions
        return (errors.RayActorError, errors.RayTaskError, errors.ObjectLostError, TimeoutError)

    def _raise_fault(self, loss: BaseException) -> None:
        """Raises UserError where it is the environments that fail, and not the process or the machine."""
        if not isinstance(loss, self._ray.exceptions.RayTaskError) or isinstance(loss.cause, SimulatorDied):
            return
        if isinstance(loss.cause, UserError):
            raise UserError(str(loss.cause)) from None
        last = str(loss).strip().splitlines()[-1]
        raise UserError(f"environments of {self.plan.request.name} failed at {self.facts.host}: {last}") from loss

    def _reason(self, loss: BaseException) -> str:
        if isinstance(loss, self._ray.exceptions.RayTaskError):
            return str(loss.cause)
        return str(loss) if isinstance(loss, TimeoutError) else "their process or machine is gone"

    def _replace(self) -> Reply | None:
        """Lets another actor begin where the lost one stood; answers by itself where that cannot be repeated."""
        self._actor, self._asked_at = self._actors.take(), time.monotonic()
        if self._point is None:
            return self._begun_anew()
        calls = self._actor.repeat.remote(self.plan, self._point, self._journal, self._keeps())
        self._runs = {calls: self._actor}
        return None

    def _begun_anew(self) -> Reply | None:
        """Begins new episodes, of seeds that were not used. A step that was lost is one without rewards that cuts the
        old ones off."""
        self._begun += 1
        seeds = [seed + self._begun * NEW_SEEDS for seed in self.plan.request.seeds]
        begin: list[Call] = [("seed", (seeds,)), ("reset", (None,))]
        last = self._journal[-1]
        if last[0] != "step":
            calls = [*begin[:1], last]
            self._runs = {self._actor.repeat.remote(self.plan, Point(), calls, False): self._actor}
            return None
        self._journal = begin
        new = self._ray.get(self._actor.repeat.remote(self.plan, Point(), begin, True))
        cut, nothing = np.ones(self.rows, bool), np.zeros(self.rows)
        infos = {"executed_steps": np.zeros(self.rows, np.int64), "final_observations": self._seen}
        return Reply(StepResult(new.value, nothing, ~cut, cut, infos), new.point)

    def close(self) -> None:
        """Ends its actors."""
        for actor in {id(a): a for a in (*self._runs.values(), self._actor)}.values():
            self._actors.end(actor)
