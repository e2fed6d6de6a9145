"""DiffuserLite in environments: episodes, accounting of returns, and how many decisions it makes in a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffusion_rl.envs.interface import VectorEnv
from diffusion_rl.methods.diffuser_lite.domains import Targets
from diffusion_rl.methods.diffuser_lite.planner import DiffuserLite

LATENCIES_SKIPPED = 1  # the first decision compiles the program


class LiteEpisodes(NamedTuple):
    """One episode of each of E environments.

    Attributes:
        returns: [E], rewards up to and including the step that ended the episode.
        published: [E], as the original counts (see `run_lite_episodes`).
        steps: [E].
        seconds: of each decision, without the first.
    """

    returns: np.ndarray
    published: np.ndarray
    steps: np.ndarray
    seconds: list[float]


def run_lite_episodes(
    planner: DiffuserLite,
    venv: VectorEnv,
    noise: Any,
    targets: Targets,
    *,
    limit: int,
    published: str = "",
    reset_options: list[dict[str, Any]] | None = None,
    say: Callable[[int, np.ndarray], None] = lambda step, returns: None,
) -> LiteEpisodes:
    """Act in E environments until every first episode has ended.

    The original counts otherwise. On locomotion tasks ("mujoco") the reward of the step that ends an episode is lost,
    and from step 1000 on every environment's reward counts; on the others ("kitchen", "antmaze") what an environment
    gives after its episode counts, too.

    Args:
        limit: steps of an episode.
        published: the kind of task, to let targets depend on returns as the original counts them; "" does not.
    """
    observations = venv.reset(reset_options)["state"][:, -1]
    alive, steps = np.ones(venv.n_envs, bool), np.zeros(venv.n_envs, np.int64)
    returns, original = np.zeros(venv.n_envs), np.zeros(venv.n_envs)
    seconds: list[float] = []
    for step in range(1, limit + 1):
        wanted = targets(observations, original if published else returns)
        draws, began = planner.draw(noise, venv.n_envs), time.perf_counter()
        actions = planner.act(observations, wanted, draws)
        if step > LATENCIES_SKIPPED:
            seconds.append(time.perf_counter() - began)
        result = venv.step(actions[:, None])
        returns += np.where(alive, result.rewards, 0)
        steps[alive] = step
        alive &= ~(result.terminated | result.truncated)
        lost = published == "mujoco" and step < 1000
        original += np.where(alive, result.rewards, 0) if lost else result.rewards
        observations = result.observations["state"][:, -1]
        say(step, returns)
        if not alive.any():
            break
    return LiteEpisodes(returns, original, steps, seconds)


def decision_times(
    planner: DiffuserLite, noise: Any, n_envs: int, decisions: int = 1000, warm_up: int = 50
) -> np.ndarray:
    """Seconds of each decision [decisions], from a raw observation to an action on the host, its draws included."""
    observations = noise.normal((n_envs, len(planner.means)))
    targets = np.ones(n_envs, np.float32)
    found = []
    for number in range(warm_up + decisions):
        began = time.perf_counter()
        planner.act(observations, targets, planner.draw(noise, n_envs))
        if number >= warm_up:
            found.append(time.perf_counter() - began)
    return np.array(found)
