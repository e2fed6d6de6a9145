"""D4RL and Minari files (written here in their layouts), conversion, the validator, and both command lines."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource, NoiseTape
from diffusion_rl.data.convert import convert, convert_file
from diffusion_rl.data.episodes import load_episodes, read_npz, split_episodes
from diffusion_rl.data.sequences import SequenceDataset
from diffusion_rl.data.sources import load
from diffusion_rl.data.validate import validate

SCRIPTS = Path(__file__).resolve().parents[1] / "script" / "dataset"


def d4rl_file(path: Path, **changes) -> Path:
    """12 rows: an episode of 5 ending in a terminal, one of 3 cut, one of 2 without reward, and 2 rows left over."""
    n = 12
    rows = np.arange(n, dtype=np.float32)
    arrays = {
        "observations": np.stack([rows, np.full(n, 7, np.float32)], 1),
        "actions": np.sin(rows)[:, None],
        "rewards": np.where((rows >= 8) & (rows < 10), 0, 1).astype(np.float32),
        "terminals": rows == 4,
        "timeouts": (rows == 7) | (rows == 9),
    } | changes
    with h5py.File(path, "w") as f:
        for key, value in arrays.items():
            if value is not None:
                f[key] = value
        f["metadata/algorithm"] = "none"
    return path


def minari_file(folder: Path, dictionary: bool = False) -> Path:
    """Eleven episodes of 3 steps (so that numerical and alphabetical order differ), every second one cut."""
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as f:
        for i in range(11):
            group = f.create_group(f"episode_{i}")
            states = np.arange(4, dtype=np.float64)[:, None] + 10 * i
            if dictionary:
                group["observations/position"], group["observations/goal"] = states, np.full((4, 2), i)
            else:
                group["observations"] = states
            group["actions"] = np.full((3, 2), i, np.float32)
            group["rewards"] = np.full(3, 0.5)
            group["terminations"] = np.array([False, False, i % 2 == 0])
            group["truncations"] = np.array([False, False, i % 2 == 1])
    return folder


def test_d4rl_episodes_and_ranges(tmp_path):
    episodes, normalization = load(d4rl_file(tmp_path / "d.hdf5"))
    assert episodes.traj_lengths.tolist() == [5, 3, 2]
    assert np.flatnonzero(episodes.terminals).tolist() == [4]
    assert episodes.returns.tolist() == [5, 3, 0]
    assert normalization.obs_max.tolist() == [11, 7]  # the two left-over rows count, as in the reference


def test_conversion_by_hand(tmp_path):
    converted = convert_file(d4rl_file(tmp_path / "d.hdf5"), tmp_path / "out")
    assert converted.skipped == 1
    found = load_episodes(tmp_path / "out" / "train.npz")
    assert found.traj_lengths.tolist() == [5, 3]
    np.testing.assert_allclose(found.states[:, 0], 2 * np.arange(8) / (11 + 1e-6) - 1, rtol=1e-6)
    np.testing.assert_array_equal(found.states[:, 1], -1)  # a constant dimension
    statistics = read_npz(tmp_path / "out" / "normalization.npz")
    assert set(statistics) == {"obs_min", "obs_max", "action_min", "action_max"}
    assert len(SequenceDataset(tmp_path / "out" / "train.npz", horizon_steps=3)) == 3 + 1
    lines = "\n".join(validate(tmp_path / "out"))
    assert "2 episodes, 8 transitions, lengths 3 to 5" in lines
    assert "constant dimensions 1" in lines and "nearly constant" in lines
    assert "1 episodes end with a terminal, 1 were cut" in lines


def test_split_by_episodes(tmp_path):
    episodes, normalization = load(minari_file(tmp_path / "m"))
    converted = convert(episodes, normalization, val_split=0.5, rng=NoiseTape([np.arange(11)[::-1]]))
    first = [int(np.rint((s[0] + 1) / 2 * 102 / 10)) for s in converted.splits["train"].states[::3]]
    assert first == [6, 7, 8, 9, 10]  # int(11 * 0.5) episodes, drawn from the back, kept in their order
    assert len(converted.splits["val"].traj_lengths) == 6
    few = convert(episodes, normalization, max_episodes=4, val_split=0.25, rng=NoiseSource(0))
    assert [len(few.splits[k].traj_lengths) for k in ("train", "val")] == [3, 1]


def test_minari_order_and_last_observation(tmp_path):
    episodes, _ = load(minari_file(tmp_path / "m"))
    assert episodes.traj_lengths.tolist() == [3] * 11
    assert episodes.states[:, 0].tolist() == [10 * i + t for i in range(11) for t in range(3)]
    assert np.flatnonzero(episodes.terminals).tolist() == [3 * i + 2 for i in range(0, 11, 2)]


def test_minari_dictionary_observations(tmp_path):
    folder = minari_file(tmp_path / "m", dictionary=True)
    episodes, _ = load(folder, ["goal", "position"])
    assert episodes.states.shape == (33, 3) and episodes.states[4].tolist() == [1, 1, 11]
    with pytest.raises(UserError, match="choose with --obs-keys from goal, position"):
        load(folder)
    with pytest.raises(UserError, match="no such observation: speed"):
        load(folder, ["speed"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rewards": None}, "missing rewards"),
        ({"rewards": np.ones(11)}, "different lengths"),
        ({"terminals": np.zeros(12, bool), "timeouts": None}, "no episode is complete"),
        ({"actions": np.full((12, 1), np.nan)}, "actions holds NaN"),
        ({"rewards": np.zeros(12)}, "no episode left for train of 3"),
    ],
)
def test_wrong_d4rl_files(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert_file(d4rl_file(tmp_path / "d.hdf5", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def robomimic_file(path: Path, arms: int = 1) -> Path:
    """Eleven demonstrations of 3 steps, with pictures of 4 by 5 pixels."""
    with h5py.File(path, "w") as f:
        for i in range(11):
            group, rows = f.create_group(f"data/demo_{i}"), np.arange(3.0)[:, None] + 10 * i
            for arm in range(arms):
                for part, size in (("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2), ("joint_pos", 7)):
                    group[f"obs/robot{arm}_{part}"] = np.tile(rows, size) + arm
            group["obs/object"] = np.tile(-rows, 10)
            group["obs/agentview_image"] = np.full((3, 4, 5, 3), [i, 50, 100], np.uint8)
            group["actions"] = np.full((3, 7 * arms), i / 10)
            group["rewards"], group["dones"] = np.array([0.0, 0, 1]), np.array([0, 0, 1])
    return path


@pytest.mark.parametrize("arms", [1, 2])
def test_robomimic_demonstrations(arms, tmp_path):
    episodes, normalization = load(robomimic_file(tmp_path / "r.hdf5", arms), max_episodes=4)
    assert episodes.traj_lengths.tolist() == [3] * 4 and not episodes.terminals.any()
    assert episodes.states.shape == (12, 9 * arms + 10) and episodes.images is None
    assert episodes.states[:, 0].tolist() == [10 * i + t for i in range(4) for t in range(3)]
    assert normalization.obs_max[[0, -1]].tolist() == [32, 0]  # of the episodes that were read, as in the reference


def test_robomimic_pictures_from_the_command_line(tmp_path):
    source, out = robomimic_file(tmp_path / "r.hdf5"), tmp_path / "out"
    options = f"--load_path {source} --save_dir {out} --normalize --cameras agentview agentview --val_split 0.3"
    ended = run("process_robomimic_dataset.py", *options.split())
    assert ended.returncode == 0, ended.stderr
    found = load_episodes(out / "train.npz")
    assert len(found.traj_lengths) == 7 and found.states.shape == (21, 9) and found.returns.tolist() == [1] * 7
    assert found.images.shape == (21, 6, 4, 5) and found.images.dtype == np.uint8
    assert (found.images[:, [1, 2, 4, 5]] == np.array([50, 100, 50, 100])[None, :, None, None]).all()
    wrong = run("process_robomimic_dataset.py", *options.replace("agentview", "above").split())
    assert wrong.returncode == 2 and "data/demo_0: missing obs/above_image" in wrong.stderr


def test_robomimic_filter_keys(tmp_path):
    source, out = robomimic_file(tmp_path / "r.hdf5"), tmp_path / "out"
    with h5py.File(source, "a") as f:
        f["mask/train"] = np.array([b"demo_10", b"demo_2"])
    episodes, _ = load(source, ["robot0_joint_pos"], filter_key="train")
    assert episodes.states.shape == (6, 7) and episodes.states[:, 0].tolist() == [20, 21, 22, 100, 101, 102]
    done = run("process_robomimic_dataset.py", "--load_path", source, "--save_dir", out, "--filter_key", "train")
    assert done.returncode == 0 and "train.npz: 2 episodes" in done.stdout, done.stderr
    with pytest.raises(UserError, match="no filter key 'test'; there: train"):
        load(source, filter_key="test")
    with pytest.raises(UserError, match="no file of robomimic, so it lists no demonstrations as 'train'"):
        load(d4rl_file(tmp_path / "d.hdf5"), filter_key="train")


def lerobot_folder(folder: Path, **changes) -> Path:
    """Three episodes of 2 steps in two files, the last one first."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    features = {key: {"dtype": "float32", "shape": [1]} for key in ("observation.state", "action", "next.reward")}
    features |= {key: {"dtype": "int64", "shape": [1]} for key in ("episode_index", "frame_index")}
    info = {"codebase_version": "v3.0", "total_frames": 6, "features": features}
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info | changes.pop("info", {})))
    for file, episodes in enumerate(([2], [0, 1])):
        steps = [(episode, frame) for episode in episodes for frame in (0, 1)]
        columns = {
            "observation.state": pyarrow.array(
                [[10.0 * e + f, e, f] for e, f in steps], pyarrow.list_(pyarrow.float32(), 3)
            ),
            "action": pyarrow.array([[float(e), -1.0] for e, _ in steps], pyarrow.list_(pyarrow.float32())),
            "next.reward": [float(f) for _, f in steps],
            "episode_index": [e for e, _ in steps],
            "frame_index": [f for _, f in steps],
            "task_index": [0] * len(steps),
        } | changes
        path = folder / "data" / "chunk-000" / f"file-00{file}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table({k: v for k, v in columns.items() if v is not None}), path)
    return folder


def test_lerobot_folders(tmp_path):
    episodes, normalization = load(lerobot_folder(tmp_path / "pusht"))
    assert episodes.traj_lengths.tolist() == [2, 2, 2] and episodes.returns.tolist() == [1, 1, 1]
    assert episodes.states.tolist() == [[10 * e + f, e, f] for e in range(3) for f in range(2)]
    assert episodes.actions.shape == (6, 2) and not episodes.terminals.any()
    assert normalization.obs_max.tolist() == [21, 2, 1]
    done = run("convert.py", tmp_path / "pusht", tmp_path / "out")
    assert done.returncode == 0 and "train.npz: 3 episodes" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"info": {"total_frames": 9}}, "6 of 9 steps are there"),
        ({"info": {"features": {"action": {}}}}, "no observation.state; choose with --obs-keys from action"),
        ({"info": {"features": 3}}, "names no features"),
        ({"action": None}, "lacks action"),
        ({"action": ["a", "b"]}, "is no Parquet file, or it is damaged"),
        ({"action": [[1.0], [1.0, 2.0, 3.0]]}, "rows of as many numbers each"),
    ],
)
def test_wrong_lerobot_folders(changes, message, tmp_path):
    if "action" in changes and changes["action"]:
        changes = {"action": changes["action"] * 2}
        folder = lerobot_folder(tmp_path / "wrong", **{"info": {"total_frames": 6}})
        from pyarrow import parquet, table

        path = folder / "data" / "chunk-000" / "file-001.parquet"
        parquet.write_table(
            parquet.read_table(path).drop_columns("action").append_column("action", table(changes)[0]), path
        )
    else:
        folder = lerobot_folder(tmp_path / "wrong", **changes)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_unknown_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "nothing.hdf5")
    (tmp_path / "text.hdf5").write_text("no")
    with pytest.raises(UserError, match="not an HDF5 or npz file"):
        load(tmp_path / "text.hdf5")
    with h5py.File(tmp_path / "other.hdf5", "w") as f:
        f["data/demo_0"] = 1
    with pytest.raises(UserError, match="found data"):
        load(tmp_path / "other.hdf5")
    with pytest.raises(UserError, match="main_data.hdf5"):
        load(tmp_path)


def run(script: str, *args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPTS / script, *map(str, args)], capture_output=True, text=True)


def test_command_lines(tmp_path):
    out = tmp_path / "out"
    done = run("convert.py", d4rl_file(tmp_path / "d.hdf5"), out, "--val-split", "0.5", "--keep-unrewarded")
    assert done.returncode == 0, done.stderr
    assert "train.npz: 1 episodes" in done.stdout and "val.npz: 2 episodes" in done.stdout
    done = run("validate.py", out)
    assert done.returncode == 0 and done.stdout.endswith("ok\n")
    (out / "normalization.npz").unlink()
    for script, *args in (["validate.py", out], ["convert.py", tmp_path / "none.hdf5", out]):
        done = run(script, *args)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such file" in done.stderr


def own_data(folder: Path, **changes) -> Path:
    folder.mkdir()
    arrays = {
        "states": np.linspace(-1, 1, 12).reshape(6, 2),
        "actions": np.zeros((6, 1)),
        "rewards": np.ones(6),
        "terminals": np.eye(6)[2].astype(bool),
        "traj_lengths": np.array([3, 3]),
    }
    statistics = {"obs_min": -np.ones(2), "obs_max": np.ones(2), "action_min": -np.ones(1), "action_max": np.ones(1)}
    for name, content in (("train", arrays), ("normalization", statistics)):
        content |= {k: v for k, v in changes.items() if k in content}
        np.savez(folder / f"{name}.npz", **{k: v for k, v in content.items() if v is not None})
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"states": np.full((6, 2), 5.0)}, "states must be scaled to .-1, 1., but dimension 0 reaches from 5 to 5"),
        ({"terminals": np.ones(6, bool)}, "4 terminals lie inside episodes"),
        ({"obs_min": None}, "lacks obs_min"),
        ({"obs_min": np.zeros(3)}, "is for obs_dim=3, but obs_dim=2 is wanted here"),
        ({"obs_max": np.array([np.nan, 1])}, "obs_max holds NaN"),
        ({"action_min": np.full(1, 3.0)}, "action_min exceeds action_max in dimension 0"),
    ],
)
def test_the_validator_finds(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        list(validate(own_data(tmp_path / "d", **changes)))


def test_data_without_rewards_is_enough_for_pre_training(tmp_path):
    lines = list(validate(own_data(tmp_path / "d", rewards=None, terminals=None)))
    assert any("good for pre-training" in line for line in lines)


def test_without_time_outs_an_episode_ends_at_the_limit_of_steps():
    rows = np.arange(20, dtype=np.float32)[:, None]
    raw = {"states": rows, "actions": rows, "rewards": rows[:, 0], "terminals": np.isin(np.arange(20), [2])}
    assert split_episodes(raw, None, "data", 5).traj_lengths.tolist() == [3, 5, 5, 5]  # two rows are left over
    assert split_episodes(raw, None, "data").traj_lengths.tolist() == [3]
