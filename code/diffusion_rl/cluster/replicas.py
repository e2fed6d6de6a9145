"""Replicas in processes of their own, anywhere in a cluster: they take every step of a training with its driver.

Each holds the same weights, the same data and the same source of randomness. What they exchange are gradients, summed
by `tf.distribute`; so all of them stop an update at the same minibatch, and have the same weights after it, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from diffusion_rl.cluster.session import ClusterSettings, connect, cores
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.programs import GO_ON

log = logging.getLogger(__name__)

JOINING_SECONDS = 300.0  # that the processes may take to find each other
CONFIGURATION = "TF_CONFIG"
GONE = f"a replica is gone: {GO_ON} goes on from the last checkpoint"


class Replica:
    """A process that updates with the driver; lives at a Ray actor."""

    def address(self) -> str:
        """Returns where the others find it, host:port."""
        return free_address()

    def join(self, workers: list[str], number: int, build: Callable[..., Any], *arguments: Any) -> None:
        """Waits for all others, then builds what is trained."""
        from diffusion_rl.core.replicas import Replicas, used
        from diffusion_rl.core.threads import configure_threads, silence_compiler

        configure_threads()
        strategy = joined(workers, number)
        silence_compiler()
        self._used = used(Replicas(strategy=strategy))
        self._used.__enter__()
        self.trained = build(*arguments)

    def call(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Calls a method of what is trained."""
        getattr(self.trained, method)(*arguments)

    def fingerprint(self) -> str:
        """Returns a digest of the weights."""
        return fingerprint(self.trained.weights())


def free_address() -> str:
    """Returns host:port of this machine, of a port that is free."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def joined(workers: list[str], number: int) -> Any:
    """Returns the strategy of processes at these addresses, of which this one has that number; waits for all."""
    import tensorflow as tf

    logging.getLogger("tensorflow").setLevel(logging.WARNING)  # it says how it shares what
    os.environ[CONFIGURATION] = json.dumps(
        {"cluster": {"worker": workers}, "task": {"type": "worker", "index": number}}
    )
    return tf.distribute.MultiWorkerMirroredStrategy()


def fingerprint(weights: Mapping[str, np.ndarray]) -> str:
    """Returns a digest of arrays by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


class Group:
    """All replicas of a training, the driver being the first.

    To be made before TensorFlow does anything. Args:
        n: how many replicas, the driver included.
        settings: of the cluster.
        build, arguments: makes, in each of the other processes, what is trained there: with `weights()`, and the
            methods that `call` names.

    Raises:
        UserError: the processes do not find each other.
    """

    def __init__(self, n: int, settings: ClusterSettings, build: Callable[..., Any], *arguments: Any):
        from diffusion_rl.core.replicas import Replicas

        self._ray = connect(settings)
        options = {"num_cpus": int(n - 1 <= cores(self._ray)), "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        make = self._ray.remote(Replica).options(**options)
        self._others = [make.remote() for _ in range(n - 1)]
        workers = [free_address(), *self._get([other.address.remote() for other in self._others])]
        self._under_way = [
            other.join.remote(workers, number, build, *arguments) for number, other in enumerate(self._others, 1)
        ]
        self.replicas = Replicas(strategy=joined(workers, 0))
        self.wait()
        log.info("%d replicas train together", n)

    def call(self, method: str, *arguments: Any) -> None:
        """Lets all others begin a call; `wait` ends it."""
        sent = self._ray.put(arguments)
        self._under_way = [other.call.remote(method, sent) for other in self._others]

    def wait(self) -> None:
        """Waits until all others are done. Raises UserError where one has failed, or is gone."""
        self._get(self._under_way)
        self._under_way = []

    def _get(self, answers: list[Any]) -> list[Any]:
        errors = self._ray.exceptions
        try:
            return self._ray.get(answers, timeout=JOINING_SECONDS if answers else None)
        except errors.GetTimeoutError:
            raise UserError(f"replicas do not answer for {JOINING_SECONDS:g} s: are there cores for all?") from None
        except errors.RayActorError:
            raise UserError(GONE) from None
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise

    def require_equal(self, weights: Mapping[str, np.ndarray]) -> None:
        """Raises RuntimeError unless all replicas have these weights, to the bit."""
        ours = fingerprint(weights)
        theirs = self._get([other.fingerprint.remote() for other in self._others])
        if any(other != ours for other in theirs):
            raise RuntimeError("the replicas' weights have come apart")

    def close(self) -> None:
        """Ends the other processes."""
        for other in self._others:
            self._ray.kill(other, no_restart=True)


@contextmanager
def _exchanging() -> Iterator[None]:
    """Turns what TensorFlow raises where another replica is gone into a line."""
    import tensorflow as tf

    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.InternalError) as error:
        if "ollective" not in str(error) and "task" not in str(error):
            raise
        raise UserError(GONE) from None


_present: Group | None = None


def present() -> Group | None:
    """Returns the replicas that train together with this process; None: it trains alone."""
    return _present


@contextmanager
def sharing(group: Group) -> Iterator[None]:
    """Lets the trainings of this process be shared with these replicas meanwhile."""
    from diffusion_rl.core.replicas import used

    global _present
    _present = group
    try:
        with used(group.replicas):
            yield
    finally:
        _present = None
        group.close()


class InStep:
    """A trainer of the driver, some of whose calls all replicas make, too; in all else it is that trainer.

    Args:
        trainer: the driver's.
        weights: returns what all of them must have in common, by name.
    """

    def __init__(self, trainer: Any, group: Group, weights: Callable[[], Mapping[str, np.ndarray]]):
        self._trainer, self._group, self.weights = trainer, group, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def together(self, method: str, *arguments: Any, ours: Callable[[], Any]) -> Any:
        """Makes a call everywhere at the same time; `ours` is the driver's."""
        self._group.call(method, *arguments)
        with _exchanging():
            result = ours()
        self._group.wait()
        return result

    def require_equal(self) -> None:
        """Raises RuntimeError unless all replicas have the same weights, to the bit."""
        self._group.require_equal(self.weights())
