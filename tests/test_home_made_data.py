"""The maker of home-made data: a very short training, whole episodes, the files, and the shipped data."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.data.episodes import load_episodes, read_npz
from diffusion_rl.data.sequences import SequenceDataset
from diffusion_rl.data.validate import validate
from diffusion_rl.generate import gym as home_made

REPOSITORY = Path(__file__).resolve().parents[1]
TASKS = sorted(home_made.MEDIUM_RETURN)
SHIPPED = sorted(path.name for path in (REPOSITORY / "data" / "gym").iterdir() if path.is_dir())


def test_mantissas_are_rounded():
    x = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    rounded = home_made.round_mantissa(x)
    assert np.max(np.abs(rounded / x - 1)) <= 2.0**-16
    assert not np.any(rounded.view(np.uint32) & 0xFF)
    assert home_made.round_mantissa(np.array([1, -1, 0], np.float32)).tolist() == [1, -1, 0]


@pytest.mark.slow
def test_a_short_run_from_the_command_line(tmp_path):
    args = "hopper --hidden 8 --max-updates 20 --eval-every 10 --updates-per-call 10 --explore-steps 100 "
    args += "--batch-size 16 --n-envs 4 --n-eval-envs 2 --transitions 500 --work-dir work --out-dir out"
    command = [sys.executable, REPOSITORY / "script" / "dataset" / "make_gym_data.py", *args.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 updates" in done.stdout and "min left" in done.stdout
    assert (tmp_path / "work" / "actor_0000020.npz").exists()
    assert any("return" in line for line in validate(tmp_path / "out"))
    episodes = load_episodes(tmp_path / "out" / "train.npz")
    assert episodes.traj_lengths.sum() >= 500
    ends = episodes.starts + episodes.traj_lengths - 1
    assert episodes.terminals[ends].all() and episodes.terminals.sum() == len(ends)  # an untrained hopper always falls
    first = episodes.states[episodes.starts]  # every episode begins near the standing pose
    height = read_npz(tmp_path / "out" / "normalization.npz")
    np.testing.assert_allclose(
        (first[:, 0] + 1) / 2 * (height["obs_max"][0] - height["obs_min"][0]) + height["obs_min"][0], 1.25, atol=6e-3
    )


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        *[({name: 0}, name) for name in ("n_envs", "n_eval_envs", "batch_size", "replay_ratio", "updates_per_call")],
        *[({name: -1}, name) for name in ("seed", "explore_steps", "max_updates", "eval_every", "hidden")],
        *[({"replay_ratio": value}, "replay_ratio") for value in (float("nan"), float("inf"), -0.5)],
        *[({"n_envs": 10**9}, "n_envs"), ({"buffer_size": 10**12}, "buffer_size"), ({"seed": 2**40}, "seed")],
        *[
            ({"max_updates": 2499}, "max_updates"),
            ({"explore_steps": 100}, "batch_size"),
            ({"buffer_size": 9}, "buffer"),
        ],
    ],
)
def test_numbers_that_cannot_work_are_refused_before_anything_starts(changes, option, tmp_path):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}.* must be "):
        home_made.make("hopper", "medium", 1000, home_made.Settings(**changes), tmp_path / "work")
    assert not list(tmp_path.iterdir())
    home_made.Settings().check()


def test_a_buffer_becomes_the_complete_episodes_of_each_environment():
    settings = home_made.Settings(n_envs=3, explore_steps=300, buffer_size=1000)
    envs = home_made.make_envs("hopper", 3, 0)
    sampler = SimpleNamespace(rng=NoiseSource(0))  # asked for random actions only
    collector = home_made.Collector(envs, sampler, settings)
    collector.collect(0)
    rows, ended = collector.buffer.tensors(), np.stack(collector._ended)
    found = collector.episodes()
    ends = found.starts + found.traj_lengths - 1
    assert len(ends) == ended.sum() and found.terminals[ends].all() and found.terminals.sum() == len(ends)
    one, last = rows["obs"][:, 0].reshape(-1, 3, 11)[:, 0], np.flatnonzero(ended[:, 0])[-1]  # of the first environment
    np.testing.assert_array_equal(found.states[: last + 1], one[: last + 1])
    half = home_made.thinned(found, len(found.states) // 2)
    assert len(half.traj_lengths) == (len(ends) + 1) // 2
    both = home_made.joined(half, found)
    np.testing.assert_array_equal(both.states[len(half.states) :], found.states)
    np.testing.assert_allclose(both.returns, [*half.returns, *found.returns], rtol=1e-6)


def test_data_ship_for_every_task():
    assert {f"{task}-medium-v2" for task in TASKS} <= {*SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_data(name):
    folder = REPOSITORY / "data" / "gym" / name
    assert (folder / "train.npz").stat().st_size <= home_made.MAX_FILE_BYTES
    text = "\n".join(validate(folder))
    assert "constant" not in text
    data = SequenceDataset(folder / "train.npz", horizon_steps=4)
    assert data.states.dtype == np.float32 and len(data) > 45_000
    assert f"{load_episodes(folder / 'train.npz').returns.mean():.1f}" in (folder.parent / "README.md").read_text()
