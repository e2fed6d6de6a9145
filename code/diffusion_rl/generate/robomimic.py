"""Demonstrations of robomimic's tasks by the scripted experts, and their pictures.

robomimic's own demonstrations cannot be shipped with this repository; `data/robomimic/README.md` says what was made
instead. `script/dataset/make_robomimic_demos.py` is the command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffusion_rl.config.schema import require_range, require_seed
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import require_writable
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.npz import read_npz, write_npz
from diffusion_rl.data.episodes import Episodes, join, load_episodes, save_episodes, save_scaled
from diffusion_rl.data.normalizers import MinMaxNormalizer, read_bounds
from diffusion_rl.data.sources.robomimic import IMAGE_SUFFIX, low_dim_keys
from diffusion_rl.envs import robomimic
from diffusion_rl.envs.robomimic_experts import plans
from diffusion_rl.tasks.registry import tasks_of

STEPS = {task.name: task.episode_steps or 0 for task in tasks_of(simulator="robomimic")}  # of an episode
HOLD = 10  # steps that are recorded after success
MEMORY = 0.8  # share of the action noise that stays from one step to the next
SIMULATOR_FILE = "simulator_states.npz"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """attempts: episodes to begin, of which the successful ones are kept. noise: standard deviation of what is added to
    the expert's motions, in units of the action; it is correlated in time and part of the recorded actions. speed:
    largest share of an action that the expert uses. seed: of the simulator, the episodes and the noise.
    """

    attempts: int = 100
    noise: float = 0.0
    speed: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for a number that cannot work."""
        require_range("--attempts", self.attempts, 1)
        require_range("--noise", self.noise, 0)
        require_range("--speed", self.speed, above=0, most=1)
        require_seed(self.seed)


@dataclass(frozen=True)
class Demonstration:
    """states [L,O], actions [L,A], rewards [L]; simulator [L,D]: the simulator's flat state at each observation."""

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    simulator: np.ndarray

    def episode(self) -> dict[str, np.ndarray]:
        """Returns the fields of `Episodes` that it has, [L,…] float32; success does not end an episode."""
        fields = {"states": self.states, "actions": self.actions, "rewards": self.rewards}
        arrays = {name: array.astype(np.float32) for name, array in fields.items()}
        return arrays | {"terminals": np.zeros(len(self.actions), bool)}


def make_env(task: str, seed: int, pictures: bool = False) -> robomimic.Robomimic:
    """Builds the task with the observations of the data sets; with `pictures` the robot's own state and all cameras."""
    meta = robomimic.read_env_meta(f"cfg/robomimic/env_meta/{task}{'-img' if pictures else ''}.json")
    keys = low_dim_keys(len(meta["env_kwargs"]["robots"]), with_object=not pictures)
    cameras = [f"{camera}{IMAGE_SUFFIX}" for camera in meta["env_kwargs"]["camera_names"]] if pictures else []
    base = robomimic.make_simulator(meta, low_dim_keys=keys, image_keys=cameras, render=False, seed=seed)
    return robomimic.Robomimic(base, [*keys, *cameras])


def demonstrate(env: robomimic.Robomimic, task: str, seed: int, settings: Settings) -> tuple[Demonstration, bool]:
    """Runs one episode of the expert until shortly after success or the time limit; returns it and whether it
    succeeded."""
    observation, _ = env.reset(seed=seed)
    simulator, rng = env.base.env, NoiseSource(seed)
    arms = plans(task, simulator, settings.speed)
    actions = [np.array([0, 0, 0, 0, 0, 0, -1.0]) for _ in arms]
    wander = np.zeros((len(arms), 6))
    rows: list[tuple] = []
    left = STEPS[task]
    while left:
        for i, plan in enumerate(arms):
            at_rest = np.concatenate([np.zeros(6), actions[i][6:]])
            actions[i] = next(plan, at_rest)
        fresh = rng.normal(wander.shape, np.float64)
        wander = MEMORY * wander + settings.noise * np.sqrt(1 - MEMORY**2) * fresh
        action = np.concatenate([np.append(a[:6] + w, a[6]) for a, w in zip(actions, wander, strict=True)]).clip(-1, 1)
        state = np.concatenate([observation[key] for key in env.keys])
        flat = simulator.sim.get_state().flatten()
        observation, reward, *_ = env.step(action)
        rows.append((state, action, reward, flat))
        left -= 1
        if reward > 0 and not any(row[2] > 0 for row in rows[:-1]):
            left = min(left, HOLD)
    states, executed, rewards, flats = (np.array(column) for column in zip(*rows, strict=True))
    return Demonstration(states, executed, rewards, flats), bool(rewards[-1] > 0)


def collect(task: str, settings: Settings, report: Report) -> Iterator[Demonstration]:
    """Yields the successful ones of `settings.attempts` episodes, seeded one after the other."""
    settings.check()
    env, succeeded = make_env(task, settings.seed), 0
    for i in range(settings.attempts):
        demonstration, success = demonstrate(env, task, settings.seed + i, settings)
        succeeded += success
        if success:
            yield demonstration
        share = 100 * succeeded / (i + 1)
        outcome = f"success after {len(demonstration.actions)} steps" if success else "failed"
        report(f"{task} {i + 1}/{settings.attempts}: {outcome}; so far {succeeded} ({share:.0f}%)")
    env.close()


def save(out_dir: Path, demonstrations: list[Demonstration], settings: Settings, shown: int | None = None) -> Episodes:
    """Writes train.npz, normalization.npz and the simulator's states, of which pictures can be made.

    `shown` is of how many demonstrations, from the first on, the simulator's states are kept; None of all.
    """
    if not demonstrations:
        raise UserError("no episode succeeded: lower --noise or raise --attempts")
    raw = join([demonstration.episode() for demonstration in demonstrations], "demonstrations")
    save_scaled(out_dir, raw)
    simulator = np.concatenate([demonstration.simulator for demonstration in demonstrations[:shown]]).astype(np.float32)
    write_npz(out_dir / SIMULATOR_FILE, {"states": simulator, "seed": np.array(settings.seed)})
    return raw


def render(task: str, source: Path, out_dir: Path, report: Report, most: int | None = None) -> None:
    """Writes the data set of `source` as one of pictures [N,C,Hi,Wi] and the robot's own state.

    The simulator states that `save` wrote are set in a simulator with cameras; actions and rewards stay. At most `most`
    episodes are written, and only those of which there are simulator states.
    """
    episodes, states_file = load_episodes(source / "train.npz", scaled=True), source / SIMULATOR_FILE
    bounds = read_bounds(source / "normalization.npz", episodes.states.shape[1], episodes.actions.shape[1])
    saved = read_npz(states_file, ("states", "seed"))
    if len(saved) < 2 or saved["states"].ndim != 2 or saved["seed"].shape:
        raise UserError(f"{states_file}: it needs a seed and states [N,D]; make the demonstrations anew")
    ends = np.cumsum(episodes.traj_lengths)
    if len(saved["states"]) not in ends:
        raise UserError(f"{states_file}: {len(saved['states'])} states end with no episode of {source / 'train.npz'}")
    whole = int(np.searchsorted(ends, len(saved["states"]))) + 1
    episodes = episodes.select(np.arange(min(whole, most or whole)))
    if len(episodes.traj_lengths) < len(ends):
        report(f"{task}: pictures of the first {len(episodes.traj_lengths)} of {len(ends)} episodes")
    flats, seed = saved["states"][: len(episodes.states)], int(saved["seed"])
    require_writable(out_dir / "train.npz")
    env = make_env(task, seed, pictures=True)
    env.reset(seed=seed)  # the first pictures are right only after one
    images, states = [], []
    for i, flat in enumerate(flats):
        seen = env.show(flat.astype(np.float64)).values()
        images.append(np.concatenate([part for part in seen if part.ndim == 3]))
        states.append(np.concatenate([part for part in seen if part.ndim == 1]))
        if (i + 1) % 500 == 0 or i + 1 == len(flats):
            report(f"{task}: {i + 1} of {len(flats)} pictures")
    env.close()
    proprio = np.array(states, np.float32)
    own = slice(proprio.shape[1])  # in the state data set these entries come first
    normalization = MinMaxNormalizer(**bounds | {key: bounds[key][own] for key in ("obs_min", "obs_max")})
    pictures = replace(episodes, states=episodes.states[:, own], images=np.array(images))
    save_episodes(out_dir, {"train": pictures}, normalization)
