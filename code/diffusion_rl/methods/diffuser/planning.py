"""The planning loop: plan in every environment, execute the beginning of the plan, plan again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffusion_rl.envs.interface import VectorEnv
from diffusion_rl.methods.diffuser.action_only import aggregate
from diffusion_rl.methods.diffuser.model import Decision, Diffuser
from diffusion_rl.tasks.registry import normalized_score


@dataclass
class Episodes:
    """One episode of each of E environments.

    Attributes:
        returns, scores: [E];  steps: number of the last step [E];  terminated: whether it ended before the limit [E].
        seconds: of each decision, without the first.
        spreads, sizes: of each executed decision the standard deviation of the first action over the samples and its
            mean magnitude, [A] each.
    """

    returns: np.ndarray
    scores: np.ndarray
    steps: np.ndarray
    terminated: np.ndarray
    seconds: list[float] = field(default_factory=list)
    spreads: list[np.ndarray] = field(default_factory=list)
    sizes: list[np.ndarray] = field(default_factory=list)

    def action_statistics(self) -> dict[str, list[float]]:
        """Means over the executed decisions (the original divides by the limit of steps)."""
        return {"std": np.mean(self.spreads, axis=0).tolist(), "mean_abs": np.mean(self.sizes, axis=0).tolist()}

    def latency(self) -> dict[str, float]:
        """Of a decision in all environments together."""
        if not self.seconds:
            return {}
        mean = float(np.mean(self.seconds))
        return {"milliseconds_per_decision": 1000 * mean, "decisions_per_second": 1 / mean}


def run_episodes(
    planner: Diffuser,
    venv: VectorEnv,
    noise: Any,
    dataset: str,
    *,
    seed: int,
    max_episode_length: int,
    how: str = "first",
    n_exec: int = 1,
    clip_actions: bool = True,
    video: str | None = None,
    say: Callable[[int, np.ndarray, np.ndarray, Decision], None] = lambda *facts: None,
    show: Callable[[int, Decision], None] = lambda *facts: None,
) -> Episodes:
    """Act in E environments until every first episode has ended.

    Args:
        venv: environments without normalisation, one action a step; environment i starts from seed + i.
        how: which plan of the samples is executed (`aggregate`).
        n_exec: actions executed before planning again.
        clip_actions: to [-1, 1].
        video: where the first environment's episode is filmed.
        say: called after every step with its number, the rewards [E], the returns so far [E] and the decision.
        show: called with the number of a step at which a plan was made, and the decision.
    """
    options: list[dict[str, Any]] = [{"seed": seed + i} for i in range(venv.n_envs)]
    options[0] |= {"video_path": video} if video else {}
    observations = venv.reset(options)["state"][:, -1]
    alive = np.ones(venv.n_envs, bool)
    steps = np.zeros(venv.n_envs, np.int64)
    found = Episodes(np.zeros(venv.n_envs), np.zeros(venv.n_envs), steps, np.zeros(venv.n_envs, bool))
    plan: list[np.ndarray] = []
    for t in range(max_episode_length):
        if not plan:
            decision = _decide(planner, observations, noise, found, first=t == 0)
            show(t, decision)
            chosen = aggregate(decision.actions, how)
            chosen = np.clip(chosen, -1, 1) if clip_actions else chosen
            plan = [chosen[:, i] for i in range(min(n_exec, chosen.shape[1]))]
            found.spreads.append(decision.actions[:, :, 0].std(axis=1).mean(axis=0))
            found.sizes.append(np.abs(decision.actions[:, :, 0]).mean(axis=(0, 1)))
        result = venv.step(plan.pop(0)[:, None])
        found.returns += np.where(alive, result.rewards, 0)
        found.steps[alive] = t
        say(t, result.rewards, found.returns, decision)
        found.terminated |= alive & result.terminated
        alive &= ~(result.terminated | result.truncated)
        observations = result.observations["state"][:, -1]
        if not alive.any():
            break
    found.scores = np.asarray(normalized_score(dataset, found.returns))
    return found


def _decide(planner: Diffuser, observations: np.ndarray, noise: Any, found: Episodes, first: bool) -> Decision:
    draws, began = planner.draw(noise, len(observations)), time.perf_counter()
    decision = planner.act({0: observations}, draws)
    if not first:  # the first compiles the program
        found.seconds.append(time.perf_counter() - began)
    return decision
