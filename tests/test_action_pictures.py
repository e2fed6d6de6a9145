"""Action-only Diffuser that sees pictures: training, resuming, planning in robomimic's lift, and what is refused."""

import json

import numpy as np
import pytest
from tests.small_runs import assert_same_checkpoint, eagerly

from diffusion_rl.cli import diffuser
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.data.episodes import Episodes, save_scaled
from diffusion_rl.methods.diffuser.action_only import ActionDiffusion
from diffusion_rl.methods.diffuser.files import load_experiment
from diffusion_rl.methods.diffuser.model import Diffuser
from diffusion_rl.networks.temporal_unet import ActionTemporalUnet
from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint

H, O, A, T = 4, 9, 7, 3  # noqa: E741
NAME = "lift-img"
SIZE = ["--dataset", NAME, "--horizon", str(H), "--n_diffusion_steps", str(T), "--seed", "0"]
TRAIN = {"dim_mults": "(1,)", "n_saves": 2, "save_freq": 3, "batch_size": 4, "image_dim": 8, "n_train_steps": 6}
TRAIN |= {"renderer": "utils.LineRenderer", "sample_freq": 4, "n_reference": 1, "data_dir": "data"}


def train(**changes):
    with eagerly():
        diffuser.train(
            [*SIZE, *(part for key, value in (TRAIN | changes).items() for part in (f"--{key}", str(value)))]
        )


def save_data(folder, side=96):
    draw, lengths = NoiseSource(0), np.array([9, 7])
    n = lengths.sum()
    images = draw.integers(0, 256, (n, 3, side, side)).astype(np.uint8)
    rewards, terminals = np.zeros(n, np.float32), np.zeros(n, bool)
    save_scaled(folder, Episodes(draw.normal((n, O)), draw.uniform((n, A), -1, 1), lengths, rewards, terminals, images))


def planner(batch_size=3):
    network = ActionTemporalUnet(H, A, O, dim=8, dim_mults=(1,), image_shape=(3, 16, 16), image_dim=8)
    diffusion = ActionDiffusion(network, H, O, A, T, predict_epsilon=False)
    plain = type("Plain", (), {"normalize": staticmethod(lambda x: x), "unnormalize": staticmethod(lambda x: x)})
    return Diffuser(diffusion, {"observations": plain, "actions": plain}, batch_size=batch_size)


def test_plans_depend_on_what_is_seen():
    """In several environments at once as in each alone: the picture is encoded once for all samples of one."""
    draw = NoiseSource(1)
    with precision("float64"):
        plan = planner()
    state, rgb = draw.normal((2, O)), draw.integers(0, 256, (2, 3, 16, 16)).astype(np.uint8)
    noise = plan.draw(draw, 2)
    both = plan.act({0: {"state": state, "rgb": rgb}}, noise).actions
    assert both.shape == (2, 3, H, A)
    for i in range(2):
        alone = plan.act({0: {"state": state[i : i + 1], "rgb": rgb[i : i + 1]}}, noise[:, 3 * i : 3 * i + 3]).actions
        np.testing.assert_allclose(both[i], alone[0], atol=1e-12)
    other = plan.act({0: {"state": state, "rgb": rgb[::-1]}}, noise).actions
    assert not np.allclose(both, other, atol=1e-4)


def test_pictures_are_encoded_once(monkeypatch):
    """Whatever the number of samples, the encoder sees one picture an environment."""
    plan, rows = planner(batch_size=16), []
    encode = plan.diffusion.model.vision.call
    monkeypatch.setattr(
        plan.diffusion.model.vision, "call", lambda rgb, state: rows.append(len(rgb)) or encode(rgb, state)
    )
    with eagerly():
        plan.act(
            {0: {"state": np.zeros((2, O)), "rgb": np.zeros((2, 3, 16, 16), np.uint8)}}, plan.draw(NoiseSource(0), 2)
        )
    assert rows == [2]


@pytest.mark.slow
def test_training_resuming_and_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_data("data", side=16)
    train()
    train(logbase="parts", stop_at=3)
    train(logbase="parts", resume=True)
    run = tmp_path / "logs" / NAME / "diffusion" / f"actions_H{H}_T{T}"
    parts = tmp_path / "parts" / NAME / "diffusion" / run.name
    assert_same_checkpoint(run / "state_6.safetensors", parts / "state_6.safetensors")
    for name in ("_sample-reference.png", "sample-0-0.png", "sample-4-1.png"):
        assert (run / name).read_bytes() == (parts / name).read_bytes()
    with pytest.raises(UserError, match="that run has model.image_dim=8 .now 16., which resuming cannot change"):
        train(image_dim=16, resume=True)
    with pytest.raises(UserError, match="pictures are not planned"):
        train(logbase="x", diffusion_type="states_actions")
    for name, value in (("image_shape", [3, 8000, 8000]), ("image_shape", [3, 16]), ("image_dim", 10**9)):
        checkpoint = load_checkpoint(run / "state_6.safetensors")
        checkpoint.metadata["description"]["model"][name] = value
        save_checkpoint(tmp_path / "bad" / "state_6.safetensors", checkpoint.tensors, checkpoint.metadata)
        with pytest.raises(UserError):
            load_experiment(tmp_path / "bad")
    with pytest.raises(UserError, match="no pictures"):
        diffuser.train(["--dataset", "hopper-medium-v2", "--obs_type", "pixel", "--diffusion_type", "actions_only"])


@pytest.mark.slow
def test_planning_in_lift(tmp_path, monkeypatch):
    pytest.importorskip("robosuite")
    monkeypatch.chdir(tmp_path)
    save_data("data")
    train(n_train_steps=1)
    diffuser.plan_unguided(
        [*SIZE, "--max_episode_length", "3", "--batch_size", "3", "--vis_freq", "2", "--render", "True"]
    )
    folder = tmp_path / "logs" / NAME / "plans" / f"unguided_H{H}_T{T}" / "0"
    assert json.loads((folder / "rollout.json").read_text())["score"] == 0
    assert json.loads((folder / "latency.json").read_text())["milliseconds_per_decision"] > 0
    assert (folder / "0.png").is_file() and (folder / "2.png").is_file() and (folder / "rollout.mp4").is_file()
    with pytest.raises(UserError, match="--obs_type state_features: .* was trained on something else"):
        diffuser.plan_unguided([*SIZE, "--obs_type", "state_features"])
