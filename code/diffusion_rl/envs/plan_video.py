"""Films of plans: left what was planned, right what the simulator makes of the planned actions.

Shape letters: H horizon, O observation, A action; a state is time, positions and velocities, [1+nq+nv].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffusion_rl.envs.locomotion import LocomotionPhysics, LocomotionVectorEnv


def planned_states(physics: LocomotionPhysics, observations: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Returns states [H,1+nq+nv] of planned observations [H,O]; the forward position, which they lack, begins at
    `start`."""
    nq = physics.model.nq
    states = np.zeros((len(observations), physics.state_size))
    states[:, 2 : 1 + nq], states[:, 1 + nq :] = observations[:, : nq - 1], observations[:, nq - 1 :]
    states[:, 1] = start[1] + physics.dt * np.append(0, np.cumsum(observations[:-1, nq - 1]))
    return states


def film_plan(env: LocomotionVectorEnv, row: int, observations: np.ndarray, actions: np.ndarray, path: Path) -> None:
    """Films a plan, observations [H,O] and actions [H,A], made in the present state of one environment.

    Raises UserError where videos cannot be made.
    """
    state = env.get_state()
    start, warm = state["physics"][row], state["warmstart"][row]
    simulated = env.physics.step(start[None], warm[None], np.clip(actions, -1, 1)[None]).states[0]
    planned = planned_states(env.physics, observations, start)
    recorder = env.recorder(str(path))
    for pair in zip(planned, [start, *simulated[:-1]], strict=True):
        recorder.add(np.stack(pair))
    recorder.close()
