"""Maze2D: data from a controller that follows waypoints, and episodes of following a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffusion_rl.core.typing import Rng
from diffusion_rl.envs.interface import Observations
from diffusion_rl.envs.maze2d import Maze2D
from diffusion_rl.methods.diffuser.model import Decision, Diffuser
from diffusion_rl.training.episodes import Alone, Step, run

PULL, BRAKE = 10.0, 1.0  # gains of the controller: towards the waypoint, against the velocity
PASSED = 0.25  # distance at which a waypoint has been reached; of the last one a tenth of a cell


def waypoint_data(env: Maze2D, n_steps: int, rng: Rng) -> dict[str, np.ndarray]:
    """Returns flat arrays as in D4RL's files: one goal after another, with no pause and no end of episodes in between.

    Returns:
        observations [N,4], actions [N,2], rewards, terminals (all false), timeouts (the last step) [N].
    """
    observation, way = env.reset(rng), list[np.ndarray]()
    rows: dict[str, list[Any]] = {"observations": [], "actions": [], "rewards": []}
    for _ in range(n_steps):
        position, velocity = observation[:2], observation[2:]
        while way and np.linalg.norm(way[0] - position) < (PASSED if len(way) > 1 else 0.1):
            way.pop(0)
        while not way:
            goal = env.free[rng.integers(0, len(env.free), (1,))[0]]
            way = env.path(position, goal)[1:]
        action = PULL * (way[0] - position) - BRAKE * velocity
        action = np.clip(action + 0.1 * rng.normal((2,), np.float64), -1, 1)
        rows["observations"].append(observation)
        rows["actions"].append(action)
        observation, reward = env.step(action)
        rows["rewards"].append(reward)
    arrays = {key: np.asarray(values, np.float32) for key, values in rows.items()}
    timeouts = np.zeros(n_steps, bool)
    timeouts[-1] = True
    return arrays | {"terminals": np.zeros(n_steps, bool), "timeouts": timeouts}


class MazeEpisode(NamedTuple):
    """What happened in one episode: observations [steps+1,4], return, number of the last step, and the first plans."""

    observations: np.ndarray
    episode_return: float
    step: int
    plans: Decision


def follow_plan(
    planner: Diffuser,
    env: Maze2D,
    rng: Rng,
    start: np.ndarray,
    replan_every: int = 0,
    say: Callable[[int, float, float, np.ndarray], None] = lambda *facts: None,
) -> MazeEpisode:
    """Plans from the current observation to the goal, then steers from each planned state to the next.

    Args:
        start: observation after the reset.
        replan_every: steps after which it plans again, for what is left of the horizon; 0: never.
        say: called after every step with its number, the reward, the return so far and the observation.
    """
    observed, horizon, begun = [start], planner.horizon, 0
    decision = plans = _plan(planner, env, rng, start, horizon)

    def act(t: int, observations: Observations) -> np.ndarray:
        nonlocal decision, begun
        observation = observations["state"][0, -1]
        if replan_every and t and t % replan_every == 0 and t < horizon:
            planner.horizon, begun = _shorter(planner, horizon - t), t
            decision = _plan(planner, env, rng, observation, planner.horizon)
        sequence = decision.observations[0, 0]
        following = sequence[t - begun + 1] if t - begun < len(sequence) - 1 else sequence[-1] * [1, 1, 0, 0]
        return (following[:2] - observation[:2] + following[2:] - observation[2:])[None, None]

    def on_step(step: Step) -> None:
        observed.append(step.result.observations["state"][0, -1])
        say(step.number, float(step.result.rewards[0]), float(step.returns[0]), observed[-1])

    episode = run(act, Alone(env.step), Alone.observed(start), env.max_episode_steps, on_step)
    planner.horizon = horizon
    return MazeEpisode(np.stack(observed), float(episode.returns[0]), env.max_episode_steps - 1, plans)


def _plan(planner: Diffuser, env: Maze2D, rng: Rng, observation: np.ndarray, horizon: int) -> Decision:
    goal = np.array([*env.target, 0, 0])
    return planner.act({0: observation[None], horizon - 1: goal[None]}, planner.draw(rng, 1))


def _shorter(planner: Diffuser, steps: int) -> int:
    """Returns the longest horizon up to so many steps that the network can halve often enough."""
    parts = 2 ** (planner.diffusion.model.levels - 1)
    return max(steps // parts * parts, parts)
