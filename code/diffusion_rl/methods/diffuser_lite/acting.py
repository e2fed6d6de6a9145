"""DiffuserLite in environments: episodes, accounting of returns, and how many decisions it makes in a second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_rl.core.typing import Rng
from diffusion_rl.envs.interface import Observations, VectorEnv
from diffusion_rl.methods.diffuser_lite.domains import Targets
from diffusion_rl.methods.diffuser_lite.planner import DiffuserLite
from diffusion_rl.training.episodes import FirstEpisodes, Step, Stopwatch, run

LAST_COUNTED = 1000  # step of a locomotion task from which on the original counts every reward


@dataclass
class LiteEpisodes(FirstEpisodes):
    """One episode of each of E environments.

    Attributes:
        published: returns [E] as the original counts them (see `run_lite_episodes`).
        seconds: of each decision, without the first.
    """

    published: np.ndarray
    seconds: list[float]


def run_lite_episodes(
    planner: DiffuserLite,
    venv: VectorEnv,
    rng: Rng,
    targets: Targets,
    *,
    limit: int,
    published: str = "",
    reset_options: list[dict[str, Any]] | None = None,
) -> LiteEpisodes:
    """Acts in E environments until every first episode has ended.

    The original counts otherwise. On locomotion tasks ("mujoco") the reward of the step that ends an episode is lost,
    and from step 1000 on every environment's reward counts; on the others ("kitchen", "antmaze") what an environment
    gives after its episode counts, too.

    Args:
        limit: steps of an episode.
        published: the kind of task, to let targets depend on returns as the original counts them; "" does not.
    """
    counted, watch = np.zeros(venv.n_envs), Stopwatch()
    returns = np.zeros(venv.n_envs)

    def act(number: int, observations: Observations) -> np.ndarray:
        state = observations["state"][:, -1]
        wanted, draws = targets(state, counted if published else returns), planner.draw(rng, venv.n_envs)
        return watch.time(lambda: planner.act(state, wanted, draws))[:, None]

    def on_step(step: Step) -> None:
        returns[:] = step.returns
        lost = published == "mujoco" and step.number + 1 < LAST_COUNTED
        counted[:] += np.where(step.going_on, step.result.rewards, 0) if lost else step.result.rewards

    episodes = run(act, venv, venv.reset(reset_options), limit, on_step)
    return LiteEpisodes(**vars(episodes), published=counted, seconds=watch.seconds)


def decision_times(
    planner: DiffuserLite, rng: Rng, n_envs: int, decisions: int = 1000, warm_up: int = 50
) -> np.ndarray:
    """Measures the seconds of each decision [decisions], from raw observation to action, its draws included."""
    observations = rng.normal((n_envs, len(planner.means)))
    targets = np.ones(n_envs, np.float32)
    seconds = []
    for number in range(warm_up + decisions):
        began = time.perf_counter()
        planner.act(observations, targets, planner.draw(rng, n_envs))
        if number >= warm_up:
            seconds.append(time.perf_counter() - began)
    return np.array(seconds)
