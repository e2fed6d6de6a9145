"""Windows over episodes: recordings of the PyTorch reference replayed, and the errors a user can meet."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource, NoiseTape
from diffusion_rl.data.sequences import QLearningDataset, SequenceDataset
from diffusion_rl.data.windows import discounted_returns

GOLDENS = Path(os.environ.get("DPPO_GOLDEN_DIR", Path(__file__).resolve().parents[1] / "parity_tests" / "goldens"))


def golden(case: str, tmp_path: Path) -> tuple[dict, dict[str, np.ndarray], Path]:
    """Metadata, arrays, and the recorded data set as a file."""
    if "DPPO_GOLDEN_DIR" in os.environ and not (GOLDENS / f"{case}.npz").exists():  # ours are all here
        pytest.skip(f"no recording {case} in {GOLDENS}")
    with np.load(GOLDENS / f"{case}.npz") as z:
        meta, arrays = json.loads(str(z["meta"])), {k: z[k] for k in z.files if k != "meta"}
    path = tmp_path / "train.npz"
    np.savez(path, **{k[11:]: v for k, v in arrays.items() if k.startswith("in/dataset.")})
    return meta, arrays, path


@pytest.mark.parametrize("case", ["dataset_base", "dataset_cond2", "dataset_img"])
def test_windows_equal_the_reference(case, tmp_path):
    meta, arrays, path = golden(case, tmp_path)
    data = SequenceDataset(str(path), **meta["kwargs"])
    assert len(data) == arrays["out/length"]
    np.testing.assert_array_equal(data.indices, arrays["out/indices"])
    actions, conditions = data.gather(np.arange(len(data)))
    np.testing.assert_array_equal(actions, arrays["out/items.actions"])
    assert set(conditions) == {k.rsplit(".", 1)[1] for k in arrays if "conditions" in k}
    for key, values in conditions.items():
        np.testing.assert_array_equal(values, arrays[f"out/items.conditions.{key}"])
        assert values.dtype == arrays[f"out/items.conditions.{key}"].dtype
    item = data.item(3)
    np.testing.assert_array_equal(item.actions, arrays["out/items.actions"][3])
    np.testing.assert_array_equal(item.conditions["state"], arrays["out/items.conditions.state"][3])


def test_q_learning_transitions_equal_the_reference(tmp_path):
    meta, arrays, path = golden("dataset_qlearn", tmp_path)
    data = QLearningDataset(str(path), **meta["kwargs"])
    np.testing.assert_array_equal(data.indices, arrays["out/indices"])
    batch = data.gather(np.arange(len(data)))
    for key in ("actions", "rewards", "dones", "reward_to_gos"):
        np.testing.assert_array_equal(getattr(batch, key), arrays[f"out/items.{key}"], err_msg=key)
    for key in ("state", "next_state"):
        np.testing.assert_array_equal(batch.conditions[key], arrays[f"out/items.conditions.{key}"], err_msg=key)
    np.testing.assert_array_equal(data.reward_to_go, arrays["out/reward_to_go"])
    assert data.item(-1).reward_to_gos.shape == (1,)


def test_split_draws_as_the_reference_and_validates_on_the_rest(tmp_path):
    _, arrays, path = golden("dataset_train_val_split", tmp_path)
    data = SequenceDataset(path, horizon_steps=4)  # 15 rows in two episodes: 15 - 2 * 3 = 9 windows, as recorded
    assert len(data) == len(arrays["in/sample_order"])
    n = len(arrays["out/train_indices"])
    train, validation = data.split((n + 0.5) / len(data), NoiseTape([arrays["in/sample_order"]]))
    np.testing.assert_array_equal(data.indices[train], arrays["out/train_indices"])
    assert sorted([*train, *validation]) == list(range(len(data)))


def write(path: Path, lengths=(5, 2, 4), **changes) -> Path:
    """A data set in which a state says its row, in sixteenths, and an action is half of it."""
    n = sum(lengths)
    rows = np.arange(n, dtype=np.float32) / 16
    arrays = {
        "states": np.stack([rows, -rows], 1),
        "actions": rows[:, None] / 2,
        "rewards": np.ones(n, np.float32),
        "terminals": np.zeros(n, bool),
        "traj_lengths": np.array(lengths),
    } | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_windows_by_hand(tmp_path):
    data = SequenceDataset(write(tmp_path / "d.npz"), horizon_steps=4, cond_steps=3)
    # episode 0 is rows 0-4: windows at 0 and 1; episode 1 (rows 5, 6) is too short; episode 2 is rows 7-10: one window
    assert data.indices.tolist() == [[0, 0], [1, 1], [7, 0]]
    assert data.n_short_episodes == 1
    actions, conditions = data.gather([1, 2])
    assert (32 * actions[..., 0]).tolist() == [[1, 2, 3, 4], [7, 8, 9, 10]]
    assert (16 * conditions["state"][..., 0]).tolist() == [[0, 0, 1], [7, 7, 7]]


def test_max_n_episodes_and_dimensions(tmp_path):
    data = SequenceDataset(write(tmp_path / "d.npz"), horizon_steps=2, max_n_episodes=2)
    assert data.states.shape == (7, 2) and data.traj_lengths.tolist() == [5, 2]
    data.require_dims(2, 1)
    with pytest.raises(UserError, match="obs_dim=2 and action_dim=1, the configuration says obs_dim=11"):
        data.require_dims(11, 3)


def test_q_learning_leaves_out_the_last_window_of_cut_episodes(tmp_path):
    terminals = np.zeros(11, bool)
    terminals[4] = True
    data = QLearningDataset(write(tmp_path / "d.npz", terminals=terminals), horizon_steps=2)
    assert data.indices[:, 0].tolist() == [0, 1, 2, 3, 7, 8]
    batch = data.gather(np.arange(6))
    assert (16 * batch.conditions["next_state"][:, 0, 0]).tolist() == [2, 3, 4, 5, 0, 0]  # the last two windows: zero
    assert batch.reward_to_gos is None


def test_discounted_returns():
    # episodes [1, 2, 3] and [4], discount 1/2: 1 + 2/2 + 3/4 = 2.75; 2 + 3/2 = 3.5; 3; 4
    rewards = np.array([1, 2, 3, 4], np.float32)
    assert discounted_returns(rewards, np.array([3, 1]), 0.5).tolist() == [2.75, 3.5, 3, 4]


@pytest.mark.parametrize("fraction", [0.0, 1.5, 0.01])
def test_a_useless_split_is_refused(fraction, tmp_path):
    with pytest.raises(UserError, match="train_split"):
        SequenceDataset(write(tmp_path / "d.npz"), horizon_steps=2).split(fraction, NoiseSource(0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"states": None}, "missing states"),
        ({"traj_lengths": None}, "missing traj_lengths"),
        ({"traj_lengths": np.array([5, 2, 40])}, "adds up to 47"),
        ({"traj_lengths": np.array([5.0, 6.0])}, "integers"),
        ({"traj_lengths": np.array([12, -1])}, "non-negative"),
        ({"states": np.full((11, 2), np.nan)}, "states holds NaN or infinity .first in row 0"),
        ({"actions": np.r_[np.zeros(10), np.inf][:, None]}, "actions holds NaN or infinity .first in row 10"),
        ({"states": np.zeros(11)}, "states must have 2 dimensions"),
        ({"states": np.array([{}] * 11, dtype=object)}, "not an npz of plain arrays"),
        ({"traj_lengths": np.array([1] * 11)}, "longest episode: 1"),
        ({"traj_lengths": np.array([], int)}, "11 rows, but traj_lengths adds up to 0"),
        ({"traj_lengths": np.array([], int), **dict.fromkeys(("states", "actions"), np.zeros((0, 2)))}, "rows"),
        ({"states": np.zeros((12, 2))}, "states has 12 rows, but traj_lengths adds up to 11"),
        ({"rewards": np.zeros(12)}, "rewards has 12 rows, but traj_lengths adds up to 11"),
        ({"traj_lengths": np.array([2**62, 2**62, 2**62, 2**62, 11])}, f"adds up to {2**64 + 11}"),
        ({"states": np.full((11, 2), 7.0)}, "states must be scaled to .-1, 1., but dimension 0 reaches from 7 to 7"),
        ({"actions": np.full((11, 1), -30.0)}, "actions must be scaled to .-1, 1., but dimension 0"),
        ({"actions": np.ones((11, 1), int)}, "actions are of type int64, as choices of a discrete space"),
        ({"terminals": np.arange(11) == 5}, "an episode goes on after its terminal in row 5"),
        ({"images": np.zeros((11, 3, 4, 4), np.float32)}, "images must be uint8, got float32"),
        ({"actions": np.zeros((11, 0))}, "hold nothing"),
    ],
)
def test_a_wrong_file_is_one_clear_line(changes, message, tmp_path):
    path = write(tmp_path / "d.npz", **changes)
    with pytest.raises(UserError, match=message) as caught:
        SequenceDataset(path, horizon_steps=2)
    assert "\n" not in str(caught.value)


def test_what_is_left_out_or_unusual_is_said_in_a_line_each(tmp_path, caplog):
    SequenceDataset(write(tmp_path / "a.npz"), horizon_steps=4, max_n_episodes=2)
    QLearningDataset(write(tmp_path / "b.npz", rewards=np.zeros(11), states=np.full((11, 2), 1.5)), horizon_steps=2)
    said = [record.getMessage().removeprefix(f"{tmp_path}/") for record in caplog.records]
    SequenceDataset(write(tmp_path / "d.npz", terminals=np.arange(11) > 8), horizon_steps=2, max_n_episodes=-1)
    assert [record.getMessage() for record in caplog.records][4:] == [
        f"{tmp_path}/d.npz: 1 terminals lie inside episodes, before the last one of each"
    ]
    assert said == [
        "a.npz: the first 2 of 3 episodes are used (max_n_episodes)",
        "a.npz: 1 of 2 episodes are shorter than horizon_steps=4 and left out",
        "b.npz: states should be scaled to [-1, 1], but dimension 0 reaches from 1.5 to 1.5",
        "b.npz: every reward is 0, so there is nothing to learn of values",
    ]
    caplog.clear()
    SequenceDataset(write(tmp_path / "c.npz"), horizon_steps=2)
    assert not caplog.records


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match="no such file: .*train.npz.*convert.py"):
        SequenceDataset(tmp_path / "train.npz")
    path = write(tmp_path / "d.npz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        SequenceDataset(path)
    with pytest.raises(UserError, match="img_cond_steps"):
        SequenceDataset(path, cond_steps=1, img_cond_steps=2)
    with pytest.raises(UserError, match="no images"):
        SequenceDataset(write(tmp_path / "e.npz"), horizon_steps=2, use_img=True)
    with pytest.raises(UserError, match="Q-learning needs rewards"):
        QLearningDataset(write(tmp_path / "f.npz", rewards=None), horizon_steps=2)
