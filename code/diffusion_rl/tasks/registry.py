"""The registry of tasks: every fact of a task that is known before anything runs.

A new task is a `TaskSpec` here, a module in `envs/` (see `envs.make`) and a configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

D4RL_FILES = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
D4RL_STEPS = 1000  # of an episode, under which D4RL registers its locomotion tasks
LOCOMOTION_DATA = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")


@dataclass(frozen=True)
class TaskSpec:
    """A task. The names of its environments and data sets begin with its own.

    Attributes:
        name: with which they begin: "hopper" of "hopper-medium-v2".
        simulator: module of `envs` that builds it; None: there is none for `make_vector_env`.
        dims: sizes O and A of observation and action, for plans made without a simulator.
        episode_steps: after which an episode is over; None: the configuration says it.
        title: how figures and tables call it.
        by_success: measured by the share of successes, not by the return.
        reference_returns: of a random and of an expert policy; D4RL's normalised score is 0 and 1 there.
        d4rl_files: {data set: its file, relative to `D4RL_FILES`}.
        made_returns: of the medium and the expert policy with which home-made data are collected.
        domain: which of DiffuserLite's pipelines plans for it: "mujoco", "kitchen" or "antmaze".
        return_scales: {beginning of a data set's name: by what DiffuserLite divides its returns}.
    """

    name: str
    simulator: str | None = None
    dims: tuple[int, int] | None = None
    episode_steps: int | None = None
    title: str = ""
    by_success: bool = False
    reference_returns: tuple[float, float] | None = None
    d4rl_files: Mapping[str, str] = field(default_factory=dict)
    made_returns: tuple[float, float] | None = None
    domain: str | None = None
    return_scales: Mapping[str, float] = field(default_factory=dict)

    def covers(self, name: str) -> bool:
        """Whether a name of an environment or data set is one of this task's."""
        return name == self.name or (name.startswith(self.name) and name[len(self.name)] in "-_")


def _locomotion(name: str, scales: tuple[float, float, float], **facts: Any) -> TaskSpec:
    """Returns a locomotion task. scales: of returns, for the data medium-expert, medium-replay and medium."""
    files = {f"{name}-{data}-v2": f"gym_mujoco_v2/{name}_{data.replace('-', '_')}-v2.hdf5" for data in LOCOMOTION_DATA}
    kinds = ("medium-expert", "medium-replay", "medium")  # longer names come first
    return TaskSpec(
        name,
        "locomotion",
        episode_steps=D4RL_STEPS,
        d4rl_files=files,
        domain="mujoco",
        return_scales={f"{name}-{data}": scale for data, scale in zip(kinds, scales, strict=True)},
        **facts,
    )


def _maze2d(size: str, steps: int, reference_returns: tuple[float, float]) -> TaskSpec:
    name = f"maze2d-{size}"
    files = {f"{name}-v1": f"maze2d/{name}-sparse-v1.hdf5"}
    return TaskSpec(name, None, (4, 2), steps, reference_returns=reference_returns, d4rl_files=files)


def _antmaze_files() -> Iterator[tuple[str, str]]:
    for size, maze in (("medium", "big-maze"), ("large", "hardest-maze")):
        for goals, several in (("play", "False"), ("diverse", "True")):
            file = f"Ant_maze_{maze}_noisy_multistart_True_multigoal_{several}_sparse_fixed.hdf5"
            yield f"antmaze-{size}-{goals}-v2", f"ant_maze_v2/{file}"


#: Where one name begins with another's, the longer one comes first.
TASKS = (
    _locomotion(
        "hopper",
        (1200, 1000, 1000),
        dims=(11, 3),
        title="Hopper",
        reference_returns=(-20.272305, 3234.3),
        made_returns=(1400.0, 3300.0),
    ),
    _locomotion(
        "walker2d",
        (1600, 1300, 1300),
        dims=(17, 6),
        title="Walker2d",
        reference_returns=(1.629008, 4592.3),
        made_returns=(2800.0, 4500.0),
    ),
    _locomotion(
        "halfcheetah",
        (3600, 1600, 1700),
        dims=(17, 6),
        title="HalfCheetah",
        reference_returns=(-280.178953, 12135.0),
        made_returns=(4700.0, 10000.0),
    ),
    TaskSpec(
        "antmaze",
        dims=(29, 8),
        episode_steps=1000,
        reference_returns=(0.0, 1.0),
        d4rl_files=dict(_antmaze_files()),
        domain="antmaze",
        return_scales={"antmaze": 100},
    ),
    TaskSpec(
        "ant",
        d4rl_files={
            f"ant-{data}-v2": f"gym_mujoco_v2/ant_{data.replace('-', '_')}-v2.hdf5" for data in LOCOMOTION_DATA
        },
    ),
    TaskSpec(
        "kitchen",
        "kitchen",
        dims=(60, 9),
        episode_steps=280,
        title="Kitchen",
        reference_returns=(0.0, 4.0),
        d4rl_files={
            "kitchen-complete-v0": "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
            "kitchen-partial-v0": "kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5",
            "kitchen-mixed-v0": "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
        },
        domain="kitchen",
        return_scales={"kitchen-partial": 470, "kitchen-mixed": 400},
    ),
    _maze2d("umaze", 300, (23.85, 161.86)),
    _maze2d("medium", 600, (13.13, 277.39)),
    _maze2d("large", 800, (6.7, 273.99)),
    TaskSpec("avoiding", "d3il_avoiding"),
    TaskSpec("lift", "robomimic", episode_steps=300, by_success=True),
    TaskSpec("can", "robomimic", episode_steps=300, by_success=True),
    TaskSpec("square", "robomimic", episode_steps=400, by_success=True),
    TaskSpec("transport", "robomimic", episode_steps=800, by_success=True),
    TaskSpec("one_leg", "furniture"),
    TaskSpec("lamp", "furniture"),
    TaskSpec("round_table", "furniture"),
)


def task_named(name: str) -> TaskSpec | None:
    """Finds the task that an environment's or data set's name belongs to; None: one of the user's own."""
    return next((task for task in TASKS if task.covers(name)), None)


def tasks_of(**facts: Any) -> list[TaskSpec]:
    """Finds the tasks with these facts: `tasks_of(simulator="locomotion")`."""
    return [task for task in TASKS if all(getattr(task, key) == value for key, value in facts.items())]


def steps_of(name: str) -> int:
    """Finds the steps after which an episode is over. Raises KeyError where the registry does not say."""
    task = task_named(name)
    if task is None or task.episode_steps is None:
        raise KeyError(name)
    return task.episode_steps


def dims_of(name: str) -> tuple[int, int]:
    """Finds the sizes O and A of a task. Raises KeyError where the registry does not say."""
    task = task_named(name)
    if task is None or task.dims is None:
        raise KeyError(name)
    return task.dims


def same_task(name: str, other: str) -> bool | None:
    """Whether two names of environments or data sets are of one task; None where that cannot be known."""
    if name == other:
        return True
    tasks = task_named(name), task_named(other)
    return None if None in tasks else tasks[0] == tasks[1]


def d4rl_file(dataset: str) -> str | None:
    """Finds where D4RL keeps a data set, relative to `D4RL_FILES`; None for names that it does not have."""
    return next((task.d4rl_files[dataset] for task in TASKS if dataset in task.d4rl_files), None)


def score(dataset: str, episode_return: float | np.ndarray) -> Any:
    """Scores a return (or returns [N]), 0 to 1: whether there was any where success is what counts, else as D4RL."""
    task = task_named(dataset)
    if task is not None and task.by_success:
        return np.where(np.asarray(episode_return) > 0, 1.0, 0.0)
    return normalized_score(dataset, episode_return)


def normalized_score(dataset: str, episode_return: float | np.ndarray) -> Any:
    """Scores a return (or returns [N]) as D4RL does, 0 to 1; not a number without a reference for the data set."""
    task = task_named(dataset)
    low, high = (task and task.reference_returns) or (np.nan, np.nan)
    return (episode_return - low) / (high - low)
