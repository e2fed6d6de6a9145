"""The connection to Ray: where actors run."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import REPOSITORY

log = logging.getLogger(__name__)

PLACING_SECONDS = 30.0  # that the start of an actor on a core of its own may take
JOINING_SECONDS = 300.0  # that nodes may take to join


@dataclass(frozen=True)
class ClusterSettings:
    """What a configuration says of the cluster.

    Attributes:
        address: "local": Ray on this machine, for this run; "auto": the cluster that this machine belongs to; or
            host:port of its head.
        actors: processes that simulate; None: one for each core of the cluster.
        nodes: machines to wait for; None: those that are there.
        spares: further processes, each ready to take over from one that is late or lost.
    """

    address: str = "local"
    actors: int | None = None
    nodes: int | None = None
    spares: int = 0

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> ClusterSettings:
        """Reads `env.actors`, `env.nodes`, `env.spares` and `ray.address`."""
        env, node = cfg.get("env"), cfg.get("ray") or {}
        env = env if isinstance(env, Mapping) else {}  # in pre-training just the data set's name
        sizes: dict[str, Any] = {name: env[name] for name in ("actors", "nodes", "spares") if env.get(name) is not None}
        sizes |= {"address": str(node["address"])} if node.get("address") else {}
        return cls(**sizes)


def connect(settings: ClusterSettings) -> Any:
    """Connects this process to Ray and returns that package. Raises UserError where it is missing or not there."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its advice on GPUs; simulators use none
    os.environ.setdefault("RAY_worker_niceness", "0")  # the driver waits for its actors
    try:
        import ray
    except ImportError as error:
        raise UserError("env.cluster=ray needs Ray: pip install -e '.[cluster]'") from error
    if not ray.is_initialized():
        _silence()
        _begin(ray, settings.address)
    _await_nodes(ray, settings.nodes)
    return ray


def _silence() -> None:
    """Keeps Ray's paragraph about each lost process from the terminal, where a line of ours stands."""
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private import worker

        worker.print_to_stdstream = lambda *lines, **options: None


def _begin(ray: Any, address: str) -> None:
    paths = [str(REPOSITORY / "code"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths), "TF_CPP_MIN_LOG_LEVEL": "3"}}
    if address == "local":
        options |= {"include_dashboard": False}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"ray.address={address}: no cluster answers there ({line}); start its head with ray start --head, or "
            "take ray.address=local"
        ) from error


def _await_nodes(ray: Any, nodes: int | None) -> None:
    deadline = time.monotonic() + JOINING_SECONDS
    while nodes is not None and (present := len(alive(ray))) < nodes:
        if time.monotonic() > deadline:
            raise UserError(f"env.nodes={nodes}, and {present} have joined: start ray on the others, or lower it")
        time.sleep(0.5)


def alive(ray: Any) -> list[dict[str, Any]]:
    """Returns Ray's descriptions of the machines of the cluster."""
    return [node for node in ray.nodes() if node["Alive"]]


def cores(ray: Any) -> int:
    """Returns how many cores the cluster has."""
    return max(1, int(sum(node["Resources"].get("CPU", 0) for node in alive(ray))))
