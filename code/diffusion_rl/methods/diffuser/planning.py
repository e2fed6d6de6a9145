"""The planning loop: plan in every environment, execute the beginning of the plan, plan again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffusion_rl.core.typing import Rng
from diffusion_rl.envs.interface import Observations, VectorEnv
from diffusion_rl.methods.diffuser.action_only import aggregate
from diffusion_rl.methods.diffuser.model import Decision, Diffuser
from diffusion_rl.tasks.registry import score
from diffusion_rl.training.episodes import FirstEpisodes, Step, Stopwatch, run, seeded_options


@dataclass
class Episodes(FirstEpisodes):
    """One episode of each of E environments.

    Attributes:
        scores: [E], 0 to 1 (`tasks.registry.score`).
        seconds: of each decision, without the first.
        spreads, sizes: of each executed decision the standard deviation of the first action over the samples and its
            mean magnitude, [A] each.
    """

    scores: np.ndarray
    seconds: list[float]
    spreads: list[np.ndarray]
    sizes: list[np.ndarray]

    def action_statistics(self) -> dict[str, list[float]]:
        """Returns the means over the executed decisions (the original divides by the limit of steps)."""
        return {"std": np.mean(self.spreads, axis=0).tolist(), "mean_abs": np.mean(self.sizes, axis=0).tolist()}

    def latency(self) -> dict[str, float]:
        """Returns times of a decision in all environments together."""
        if not self.seconds:
            return {}
        mean = float(np.mean(self.seconds))
        return {"milliseconds_per_decision": 1000 * mean, "decisions_per_second": 1 / mean}


def run_episodes(
    planner: Diffuser,
    venv: VectorEnv,
    rng: Rng,
    dataset: str,
    *,
    seed: int,
    max_episode_length: int,
    how: str = "first",
    n_exec: int = 1,
    clip_actions: bool = True,
    video: str | None = None,
    say: Callable[[int, np.ndarray, np.ndarray, Decision], None] = lambda *facts: None,
    show: Callable[[int, Observations, Decision], None] = lambda *facts: None,
) -> Episodes:
    """Acts in E environments until every first episode has ended.

    Args:
        venv: environments without normalisation, one action a step; environment i starts from seed + i.
        how: which plan of the samples is executed (`aggregate`).
        n_exec: actions executed before planning again.
        clip_actions: to [-1, 1].
        video: where the first environment's episode is filmed.
        say: called after every step with its number, the rewards [E], the returns so far [E] and the decision.
        show: called with the number of a step at which a plan was made, the observations and the decision.
    """
    options = seeded_options(seed, venv.n_envs)
    options[0] |= {"video_path": video} if video else {}
    watch, spreads, sizes = Stopwatch(), list[np.ndarray](), list[np.ndarray]()
    plan: list[np.ndarray] = []
    decision: Decision

    def act(t: int, observations: Observations) -> np.ndarray:
        nonlocal decision
        if not plan:
            latest, draws = {key: o[:, -1] for key, o in observations.items()}, planner.draw(rng, venv.n_envs)
            current = latest if "rgb" in latest else latest["state"]
            decision = watch.time(lambda: planner.act({0: current}, draws))
            show(t, latest, decision)
            chosen = aggregate(decision.actions, how)
            chosen = np.clip(chosen, -1, 1) if clip_actions else chosen
            plan.extend(chosen[:, i] for i in range(min(n_exec, chosen.shape[1])))
            spreads.append(decision.actions[:, :, 0].std(axis=1).mean(axis=0))
            sizes.append(np.abs(decision.actions[:, :, 0]).mean(axis=(0, 1)))
        return plan.pop(0)[:, None]

    def on_step(step: Step) -> None:
        say(step.number, step.result.rewards, step.returns, decision)

    episodes = run(act, venv, venv.reset(options), max_episode_length, on_step)
    scores = np.asarray(score(dataset, episodes.returns))
    return Episodes(**vars(episodes), scores=scores, seconds=watch.seconds, spreads=spreads, sizes=sizes)
