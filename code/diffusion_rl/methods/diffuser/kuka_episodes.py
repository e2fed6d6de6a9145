"""The Kuka stacking task: draws of training, and episodes of planning and following plans."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffusion_rl.core.typing import Rng
from diffusion_rl.envs.kuka import KukaStacking
from diffusion_rl.methods.diffuser.kuka import KINDS, StackingPlanner
from diffusion_rl.methods.diffuser.trainer import MicroBatch
from diffusion_rl.methods.diffuser.training import DiffuserTraining
from diffusion_rl.tasks.kuka_stacking import Count


class StackingTraining(DiffuserTraining):
    """The training loop, which draws for every window of a batch what is known of it as well."""

    def _draw(self) -> list[MicroBatch]:
        def item(windows: np.ndarray) -> np.ndarray:
            return windows * KINDS + self.rng.integers(0, KINDS, (len(windows),))

        return [(item(windows), t, noise) for windows, t, noise in super()._draw()]


class StackingEpisode(NamedTuple):
    """Every state [n,39] of an episode, and what it is rewarded for."""

    states: np.ndarray
    count: Count  # type: ignore[assignment]  # hides that of tuples


def run_episode(planner: StackingPlanner, env: KukaStacking, count: Count, rng: Rng, n_plans: int) -> StackingEpisode:
    """Plans from the current state and follows the plan to its end, `n_plans` times.

    Args:
        count: the goal (`tasks.kuka_stacking.draw_task`).
        rng: the source of all draws.
    """
    states = [env.reset(rng)]
    for _ in range(n_plans):
        for command in planner.plan(states[-1], count.next, rng)[1:]:
            states.append(env.step(command))
            count = count.after(states[-1])
        states.append(env.release())
        count = count.after(states[-1])
    return StackingEpisode(np.stack(states), count)
