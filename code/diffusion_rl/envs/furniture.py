"""Furniture-Bench (Heo et al. 2023, arXiv:2305.12821): all environments in one IsaacGym simulator on a GPU.

IsaacGym ends at Python 3.8, which TensorFlow does not support, so the simulator runs in an interpreter of its own
(furniture_server.py), named by DPPO_FURNITURE_PYTHON, and is asked over a pipe. See installation/install_furniture.md.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.assets import resolve
from diffusion_rl.envs.chunks import require_finite
from diffusion_rl.envs.furniture_server import pack, unpack
from diffusion_rl.envs.interface import EnvRequest, Observations, StepResult, Unrestorable
from diffusion_rl.envs.processes import in_one_line

INTERPRETER = "DPPO_FURNITURE_PYTHON"
PAGE = "installation/install_furniture.md"
_SERVER = Path(__file__).with_name("furniture_server.py")


def vector(request: EnvRequest) -> FurnitureVectorEnv:
    """Builds the environments of a request."""
    config = request.config
    specific = {**(config.get("specific") or {}), **({"headless": False} if request.window else {})}
    return FurnitureVectorEnv(specific, len(request.seeds), request.act_steps, config["max_episode_steps"])


class FurnitureVectorEnv(Unrestorable):
    """E copies of one piece of furniture, behind the `VectorEnv` interface.

    specific: `furniture`, `randomness`, `normalization_path`, `sparse_reward`, `headless`, `gpu_id` of the reference's
    `env.specific`; `act_steps` and `obs_steps` (1) of it must be the run's. Episodes end by `max_episode_steps` alone,
    which counts as terminated and truncated, and go on until the next reset. Raises UserError where the simulator or
    the statistics are missing.
    """

    def __init__(self, specific: Mapping[str, Any], n_envs: int, act_steps: int, max_episode_steps: int):
        if specific.get("obs_steps", 1) != 1:
            raise UserError(f"env.specific.obs_steps={specific['obs_steps']}: furniture shows one observation")
        if specific.get("act_steps", act_steps) != act_steps:
            raise UserError(f"env.specific.act_steps={specific['act_steps']}, act_steps={act_steps}: make them equal")
        interpreter = _interpreter()
        statistics = resolve(specific["normalization_path"])
        self.name, self._count = f"furniture {specific['furniture']}", 0
        self.n_envs = n_envs
        self.act_steps = act_steps
        self._process, self._connection = _start(interpreter)
        options = {
            "furniture": specific["furniture"],
            "randomness": specific["randomness"],
            "n_envs": n_envs,
            "max_episode_steps": max_episode_steps,
            "headless": specific.get("headless", True),
            "gpu_id": specific.get("gpu_id", 0),
            "normalization_path": str(statistics),
            "sparse_reward": specific.get("sparse_reward", False),
        }
        spaces = self._ask(options=json.dumps(options))
        self.obs_spec: dict[str, tuple[int, ...]] = {"state": (int(spaces["obs_dim"]),)}
        self.action_dim = int(spaces["action_dim"])

    def seed(self, seeds: Sequence[int]) -> None:
        """Does nothing: the simulator has no seeds."""

    def reset(self, options: Sequence[dict[str, Any]] | None = None) -> Observations:
        self._count = -1
        return self._observations(self._ask(call="reset"), np.zeros(self.n_envs), 1)

    def step(self, actions: np.ndarray) -> StepResult:
        """Executes chunks [E,Ta,A]."""
        actions = np.asarray(actions, dtype=np.float32)
        if actions.shape != (self.n_envs, self.act_steps, self.action_dim):
            expected = (self.n_envs, self.act_steps, self.action_dim)
            raise ValueError(f"actions have shape {actions.shape}, expected {expected}")
        result = self._ask(call="step", actions=actions)
        over = result["truncated"]
        executed = np.full(self.n_envs, self.act_steps, dtype=np.int64)
        rewards = result["rewards"].astype(np.float64)
        observations = self._observations(result, rewards, self.act_steps)
        return StepResult(observations, rewards, over, over, {"executed_steps": executed})

    def _observations(self, answer: dict[str, np.ndarray], rewards: np.ndarray, steps: int) -> Observations:
        """Returns the observations [E,1,O] after `steps` actions.

        Args:
            answer: the simulator's, `state` [E,O].
            rewards: [E].
            steps: actions of the chunk; 1 after a reset, which counts as the step before the first.

        Raises:
            UserError: an observation or reward is not finite.
        """
        rows, self._count = np.arange(self.n_envs), self._count + steps
        before, shown = np.full(self.n_envs, self._count - 1), answer["state"][:, None]
        require_finite(self.name, shown, rewards[:, None], rows, np.ones(self.n_envs), before)
        return {"state": shown}

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, **message: Any) -> dict[str, np.ndarray]:
        try:
            self._connection.send_bytes(pack(**message))
            answer = unpack(self._connection.recv_bytes())
        except (EOFError, OSError):
            self.close()
            raise UserError(f"Furniture-Bench's simulator ended, exit code {self._process.returncode}") from None
        if "error" in answer:
            self.close()
            trace = str(answer["error"]).strip()
            line = f"Furniture-Bench failed in {INTERPRETER}: {in_one_line(trace)} (see {PAGE})"
            raise UserError(line) from RuntimeError(trace)
        return answer


def _interpreter() -> str:
    """Finds the Python interpreter that has the simulator. Raises UserError if there is none."""
    named = os.environ.get(INTERPRETER)
    if not named:
        raise UserError(
            f"Furniture-Bench needs IsaacGym in a Python 3.8 of its own: set {INTERPRETER} to that interpreter ({PAGE})"
        )
    interpreter = shutil.which(named)
    if interpreter is None:
        raise UserError(f"{INTERPRETER}={named} is no executable: name the Python 3.8 that has IsaacGym ({PAGE})")
    return interpreter


def _start(interpreter: str) -> tuple[subprocess.Popen, Any]:
    """Starts the server; returns its process and our end of the pipe."""
    ours, theirs = multiprocessing.Pipe()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        [interpreter, str(_SERVER), str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment
    )
    theirs.close()
    return process, ours
