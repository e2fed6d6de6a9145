"""Hopper, Walker2d and HalfCheetah under their D4RL names, all environments stepped together on threads.

The models are gymnasium's `-v4` ones with the bodies that MuJoCo 2.1.0 compiles (lighter capsules), so the physics is
that of D4RL's data sets. Observations, rewards, termination and reset noise are those of gym's `-v2` environments,
which D4RL wraps: it clips actions to [-1, 1] before the simulator and the control cost see them, and its 1000-step time
limit ends an episode as terminated *and* truncated, as gym's old interface made of it.

Each environment is a row of plain arrays (simulator state, warm start of the solver, history, random generator), which
threads load into a scratch simulator each; saving and restoring a run is copying these arrays.

Shape letters: E environments, Ta actions of a chunk, To history, O observation, A action, nq/nv positions/velocities.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.batched import BatchedVectorEnv
from diffusion_rl.envs.chunks import ChunkOutcome, StepOutcomes
from diffusion_rl.envs.interface import EnvRequest, unknown
from diffusion_rl.envs.multi_step import D4RLTerms
from diffusion_rl.envs.worker import EnvRecipe
from diffusion_rl.tasks.registry import D4RL_STEPS, LOCOMOTION_DATA

try:
    import gymnasium
    import mujoco
    from gymnasium.envs.registration import load_env_creator
    from mujoco import rollout
except ImportError as error:  # pragma: no cover - depends on the installation
    raise UserError(f'locomotion needs {error.name or error}: pip install -e ".[gym]"') from error

_BODIES = Path(__file__).parent / "assets" / "mujoco210_bodies.json"
_PHYSICS = mujoco.mjtState.mjSTATE_FULLPHYSICS.value


@dataclass(frozen=True)
class Task:
    """The differences between the three tasks (gym's `-v2` classes).

    gymnasium_id: its single-environment twin; xml, frame_skip: the model and the simulator steps per action;
    ctrl_cost, alive_bonus, reset_noise: weights; gaussian_velocity: reset velocities are normal instead of uniform;
    velocity_clip: bound on the observed velocities; height, angle, state_bound: the healthy ranges, None for none.
    """

    gymnasium_id: str
    xml: str
    frame_skip: int
    ctrl_cost: float
    alive_bonus: float
    reset_noise: float
    gaussian_velocity: bool = False
    velocity_clip: float | None = None
    height: tuple[float, float] | None = None
    angle: tuple[float, float] | None = None
    state_bound: float | None = None


TASKS = {
    "hopper": Task("Hopper-v4", "hopper.xml", 4, 1e-3, 1.0, 5e-3, False, 10.0, (0.7, np.inf), (-0.2, 0.2), 100.0),
    "walker2d": Task("Walker2d-v4", "walker2d.xml", 4, 1e-3, 1.0, 5e-3, False, 10.0, (0.8, 2.0), (-1.0, 1.0)),
    "halfcheetah": Task("HalfCheetah-v4", "half_cheetah.xml", 5, 0.1, 0.0, 0.1, True),
}


def task_of(name: str) -> str | None:
    """Finds the task of a D4RL name ("hopper-medium-v2" -> "hopper"); None if the name is no locomotion one."""
    match = re.fullmatch(rf"({'|'.join(TASKS)})-({'|'.join(LOCOMOTION_DATA)})-v[02]", name)
    return match.group(1) if match else None


def require(name: str) -> str:
    """Finds the task of a D4RL name. Raises UserError for other names."""
    task = task_of(name)
    if task is None:
        raise unknown(name, known_names())
    return task


def vector(request: EnvRequest) -> LocomotionVectorEnv:
    """Builds the environments of a request, stepped together."""
    return LocomotionVectorEnv(
        request.name,
        len(request.seeds),
        seeds=request.seeds,
        threads=request.config.get("threads", 2),
        d4rl_time_limit=request.time_limit,
        act_steps=request.act_steps,
        normalizer=request.normalizer,
        render=request.window,
        **request.chunks,
    )


def single(recipe: EnvRecipe) -> gymnasium.Env:
    """Builds the environment of a recipe."""
    return single_locomotion(
        recipe.name, time_limit=recipe.d4rl_time_limit, render_mode=recipe.render_mode, **recipe.kwargs
    )


def load_model(task: str) -> mujoco.MjModel:
    """Loads the task's model with the bodies of MuJoCo 2.1.0."""
    xml = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / TASKS[task].xml
    model = mujoco.MjModel.from_xml_path(str(xml))
    restore_bodies(model, task)
    return model


def restore_bodies(model: mujoco.MjModel, task: str) -> None:
    """Gives `model` the masses, inertias and inertial frames that MuJoCo 2.1.0 compiles for the task, in place.

    From MuJoCo 3.5 on the margins of a pair of geometries add up, where the larger one counted: they are halved. Its
    solver also ends earlier: at the tolerance of 1e-8 Hopper leaves 2.1.0's trajectories by 5e-7, at this one by 2e-12.
    """
    for name, values in json.loads(_BODIES.read_text())[task].items():
        getattr(model, name)[:] = values
    if tuple(int(part) for part in mujoco.__version__.split(".")[:2]) >= (3, 5):
        model.geom_margin /= 2
        model.opt.tolerance = 1e-12
    mujoco.mj_setConst(model, mujoco.MjData(model))


def single_locomotion(name: str, time_limit: int | None = D4RL_STEPS, **kwargs: Any) -> gymnasium.Env:
    """Builds one environment of a D4RL name, stepped by gymnasium's own class; the batched engine is tested against it.

    time_limit: D4RL's; kwargs go to gymnasium's class.
    """
    task = require(name)
    # not gymnasium.make: it warns that -v4 is old and adds wrappers
    env: Any = load_env_creator(str(gymnasium.spec(TASKS[task].gymnasium_id).entry_point))(**kwargs)
    restore_bodies(env.model, task)
    return D4RLTerms(env, time_limit)


def _make_roll() -> Callable[..., Any]:
    """Returns a single-threaded `mujoco.rollout.Rollout.rollout`; before mujoco 3.3, which has none, plain steps."""
    if hasattr(rollout, "Rollout"):
        return rollout.Rollout(nthread=0).rollout
    return _roll_by_steps


def _roll_by_steps(
    models: list,
    datas: list,
    states: np.ndarray,
    controls: np.ndarray,
    *,
    initial_warmstart: np.ndarray,
    state: np.ndarray,
    **_: Any,
) -> None:
    """Does with one row what `Rollout.rollout` does, in Python."""
    model, data = models[0], datas[0]
    mujoco.mj_setState(model, data, states[0], _PHYSICS)
    data.qacc_warmstart[:] = initial_warmstart[0]
    for control, after in zip(controls[0], state[0], strict=True):
        data.ctrl[:] = control
        mujoco.mj_step(model, data)
        mujoco.mj_getState(model, data, after, _PHYSICS)


@dataclass
class Trajectory:
    """The simulated chunk: states [E,Ta,1+nq+nv], warmstarts [E,nv] after its last action, observations [E,Ta,O],
    rewards [E,Ta], unhealthy [E,Ta] bool."""

    states: np.ndarray
    warmstarts: np.ndarray
    observations: np.ndarray
    rewards: np.ndarray
    unhealthy: np.ndarray


class LocomotionPhysics:
    """Steps any number of independent simulations of one task on `threads` threads (the caller's is one of them)."""

    def __init__(self, task: str, threads: int = 2):
        self.task = TASKS[task]
        self.model = load_model(task)
        self.threads = max(1, min(threads, os.cpu_count() or 1))
        self._datas = [mujoco.MjData(self.model) for _ in range(self.threads)]
        self._rolls = [_make_roll() for _ in range(self.threads)]
        self._init_qpos = self._datas[0].qpos.copy()
        self._init_qvel = self._datas[0].qvel.copy()
        self._pool = ThreadPoolExecutor(self.threads - 1, "locomotion") if self.threads > 1 else None
        self.state_size = mujoco.mj_stateSize(self.model, _PHYSICS)
        self.dt = self.model.opt.timestep * self.task.frame_skip

    @property
    def obs_dim(self) -> int:
        return self.model.nq + self.model.nv - 1

    @property
    def action_dim(self) -> int:
        return self.model.nu

    def first_state(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws a first state [1+nq+nv] and its warm start [nv] as gymnasium's `reset` does, in the same order."""
        noise = self.task.reset_noise
        qpos = self._init_qpos + rng.uniform(-noise, noise, size=self.model.nq)
        if self.task.gaussian_velocity:
            qvel = self._init_qvel + noise * rng.standard_normal(self.model.nv)
        else:
            qvel = self._init_qvel + rng.uniform(-noise, noise, size=self.model.nv)
        return self.state_from(qpos, qvel)

    def state_from(self, qpos: np.ndarray, qvel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the state [1+nq+nv] and warm start [nv] of a new simulation at positions [nq] and velocities [nv]."""
        data = self._datas[0]
        mujoco.mj_resetData(self.model, data)
        data.qpos[:] = qpos
        data.qvel[:] = qvel
        mujoco.mj_forward(self.model, data)
        state = np.empty(self.state_size)
        mujoco.mj_getState(self.model, data, state, _PHYSICS)
        return state, data.qacc_warmstart.copy()

    def observe(self, states: np.ndarray) -> np.ndarray:
        """Returns observations [...,O] of states [...,1+nq+nv]: positions without the forward one, velocities."""
        nq, clip = self.model.nq, self.task.velocity_clip
        velocity = states[..., 1 + nq : 1 + nq + self.model.nv]
        if clip is not None:
            velocity = np.clip(velocity, -clip, clip)
        return np.concatenate([states[..., 2 : 1 + nq], velocity], axis=-1)

    def step(self, states: np.ndarray, warmstarts: np.ndarray, actions: np.ndarray) -> Trajectory:
        """Executes actions [E, Ta, A] from states [E, 1+nq+nv] and warm starts [E, nv], neither of which is changed."""
        skip = self.task.frame_skip
        controls = np.repeat(np.asarray(actions, dtype=np.float64), skip, axis=1)
        substeps = np.empty((*controls.shape[:2], self.state_size))
        warm = np.empty_like(warmstarts)
        rows = iter(range(len(actions)))  # shared: each thread takes the next row when it is done with one
        arguments = (rows, states, warmstarts, controls, substeps, warm)
        futures = []
        if self._pool is not None:
            helpers = min(self.threads, len(actions)) - 1
            futures = [self._pool.submit(self._roll, 1 + i, *arguments) for i in range(helpers)]
        self._roll(0, *arguments)
        for future in futures:
            future.result()
        after = substeps[:, skip - 1 :: skip]
        positions = np.concatenate([states[:, None, 1], after[:, :, 1]], axis=1)
        return Trajectory(after, warm, self.observe(after), self._rewards(positions, actions), self._unhealthy(after))

    def _roll(
        self,
        thread: int,
        rows: Iterator[int],
        states: np.ndarray,
        warmstarts: np.ndarray,
        controls: np.ndarray,
        substeps: np.ndarray,
        warm: np.ndarray,
    ) -> None:
        """Rolls out one row after the other, with the interpreter lock released for the whole chunk of each.

        MuJoCo's own threaded rollout of all rows at once would keep no row's warm start, without which the next chunk
        is not bit for bit what single steps give. Row by row on Python's threads is as fast.
        """
        data, roll = self._datas[thread], self._rolls[thread]
        models, datas, sensors = [self.model], [data], np.empty((1, controls.shape[1], self.model.nsensordata))
        for row in rows:
            single = slice(row, row + 1)
            roll(
                models,
                datas,
                states[single],
                controls[single],
                skip_checks=True,
                nstep=controls.shape[1],
                initial_warmstart=warmstarts[single],
                state=substeps[single],
                sensordata=sensors,
            )
            warm[row] = data.qacc_warmstart

    def _rewards(self, positions: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Returns rewards [E,Ta] for forward positions [E,Ta+1]; the order of operations is gymnasium's."""
        velocity = (positions[:, 1:] - positions[:, :-1]) / self.dt
        cost = self.task.ctrl_cost * np.sum(np.square(actions), axis=-1)
        return (velocity + self.task.alive_bonus if self.task.alive_bonus else velocity) - cost

    def _unhealthy(self, states: np.ndarray) -> np.ndarray:
        """Whether states [...,1+nq+nv] leave the healthy ranges, bool [...]."""
        task = self.task
        healthy = np.ones(states.shape[:-1], dtype=bool)
        if task.state_bound is not None:
            healthy &= np.all(np.abs(states[..., 3:]) < task.state_bound, axis=-1)
        for column, bounds in ((2, task.height), (3, task.angle)):
            if bounds is not None:
                healthy &= (bounds[0] < states[..., column]) & (states[..., column] < bounds[1])
        return ~healthy

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class LocomotionVectorEnv(BatchedVectorEnv):
    """E locomotion environments.

    name: a D4RL name, "hopper-medium-v2" say. chunks: as `BatchedVectorEnv`'s. d4rl_time_limit: the
    limit of 1000 steps under which D4RL registers its environments, whose expiry counts as terminated *and* truncated
    (the reference never bootstraps there); None leaves only max_episode_steps, whose expiry is truncation alone.
    clip_actions: D4RL's clipping of the unnormalised action to [-1, 1].
    """

    def __init__(
        self,
        name: str,
        n_envs: int,
        *,
        seeds: Sequence[int] | None = None,
        threads: int = 2,
        d4rl_time_limit: int | None = D4RL_STEPS,
        clip_actions: bool = True,
        **chunks: Any,
    ):
        task = require(name)
        self.physics = LocomotionPhysics(task, threads)
        sizes = self.physics.obs_dim, self.physics.action_dim
        super().__init__(name, n_envs, *sizes, **{"max_episode_steps": 1000, "reset_within_step": True} | chunks)
        self.d4rl_time_limit = d4rl_time_limit
        self.clip_actions = clip_actions
        self._elapsed = np.zeros(n_envs, dtype=np.int64)
        self._states = np.zeros((n_envs, self.physics.state_size))
        self._warmstarts = np.zeros((n_envs, self.physics.model.nv))
        self._rngs: dict[int, np.random.Generator] = {}  # by environment
        self.seed(range(n_envs) if seeds is None else seeds)

    def _reseed(self, row: int, seed: int) -> None:
        """Lets it draw its next resets as a gymnasium environment does after `reset(seed=seed)`."""
        self._rngs[row] = _generator(seed)

    def _simulate(self, rows: np.ndarray, actions: np.ndarray) -> ChunkOutcome:
        raw = np.clip(actions, -1, 1) if self.clip_actions else actions
        trajectory = self.physics.step(self._states[rows], self._warmstarts[rows], raw)
        outcome = self._history.advance(rows, self._outcomes(rows, trajectory))
        last = (np.arange(len(rows)), outcome.executed - 1)
        self._warmstarts[rows] = self._warmstarts_after(rows, raw, outcome.executed, trajectory)
        self._states[rows] = trajectory.states[last]
        self._elapsed[rows] += outcome.executed
        self._watch(rows, outcome.executed, trajectory.states.__getitem__)
        return outcome

    def _warmstarts_after(
        self, indices: np.ndarray, raw: np.ndarray, executed: np.ndarray, trajectory: Trajectory
    ) -> np.ndarray:
        """Returns the warm starts [N,nv] after the executed actions.

        Where a chunk ended early and nothing resets, its executed part runs once more to learn them.
        """
        warmstarts = trajectory.warmstarts.copy()
        early = np.flatnonzero(executed < raw.shape[1]) if not self.reset_within_step else ()
        for row in early:
            state, warmstart = self._states[[indices[row]]], self._warmstarts[[indices[row]]]
            warmstarts[row] = self.physics.step(state, warmstart, raw[[row], : executed[row]]).warmstarts[0]
        return warmstarts

    def _outcomes(self, indices: np.ndarray, trajectory: Trajectory) -> StepOutcomes:
        """Puts the trajectory under D4RL's time limit and normalises its observations."""
        unhealthy = trajectory.unhealthy
        expired = np.zeros_like(unhealthy)
        if self.d4rl_time_limit is not None:
            expired = self._elapsed[indices, None] + 1 + np.arange(unhealthy.shape[1]) >= self.d4rl_time_limit
        return StepOutcomes(
            observations=self._normalize(trajectory.observations),
            rewards=trajectory.rewards,
            done=unhealthy | expired,
            limit_known=expired,
            limit_hit=expired & ~unhealthy,
        )

    def _first_observations(self, rows: np.ndarray) -> np.ndarray:
        for row in rows:
            self._states[row], self._warmstarts[row] = self.physics.first_state(self._rngs[row])
        self._elapsed[rows] = 0
        return self._normalize(self.physics.observe(self._states[rows]))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"physics": self._states, "warmstart": self._warmstarts, "elapsed_steps": self._elapsed}

    def get_state(self) -> dict[str, np.ndarray]:
        generators = np.stack([_pack_generator(self._rngs[row]) for row in range(self.n_envs)])
        return super().get_state() | {"started": self._started.copy(), "random": generators}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        super()._restore(state)
        self._started[:] = state["started"]
        self._rngs = dict(enumerate(map(_unpack_generator, np.asarray(state["random"]))))

    def scene(self) -> tuple[Callable[[], Any], dict[str, Any], int]:
        tracking = {"type": mujoco.mjtCamera.mjCAMERA_TRACKING.value, "trackbodyid": 1, "distance": 4.0}
        load = functools.partial(load_model, require(self.name))
        return load, tracking | {"elevation": -15.0}, round(1 / self.physics.dt)

    def close(self) -> None:
        """Ends videos, the window and threads."""
        super().close()
        self.physics.close()


def known_names() -> list[str]:
    """Lists the D4RL names of locomotion environments."""
    return [f"{task}-{flavour}-v2" for task in TASKS for flavour in LOCOMOTION_DATA]


def _generator(seed: int) -> np.random.Generator:
    """Returns the generator that gymnasium makes of a seed."""
    return gymnasium.utils.seeding.np_random(int(seed))[0]


_WORD = 2**64 - 1


def _pack_generator(rng: np.random.Generator) -> np.ndarray:
    """Packs the state of a PCG64 generator into uint64 [6]: two 128-bit numbers in halves, and the buffered 32 bits."""
    state = rng.bit_generator.state
    value, increment = state["state"]["state"], state["state"]["inc"]
    words = [value >> 64, value & _WORD, increment >> 64, increment & _WORD, state["has_uint32"], state["uinteger"]]
    return np.array(words, dtype=np.uint64)


def _unpack_generator(words: np.ndarray) -> np.random.Generator:
    """Inverts `_pack_generator`."""
    numbers = [int(word) for word in words]
    generator = np.random.Generator(np.random.PCG64(0))
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": numbers[0] << 64 | numbers[1], "inc": numbers[2] << 64 | numbers[3]},
        "has_uint32": numbers[4],
        "uinteger": numbers[5],
    }
    return generator
