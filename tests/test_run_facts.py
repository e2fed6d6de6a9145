"""What a checkpoint records of its run is compared with the run that takes it."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from tests.small_runs import (
    EVALUATE,
    FINE_TUNE,
    PRE_TRAIN,
    config,
    go_through,
    loop,
    make_base_policy,
    make_data,
    rows,
    run,
)

from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.methods.diffuser import files
from diffusion_rl.tasks.registry import same_task
from diffusion_rl.training import run_facts
from diffusion_rl.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from diffusion_rl.training.policy_files import open_checkpoint
from diffusion_rl.training.rollout import Rollout, episode_statistics
from diffusion_rl.training.run_facts import normalization_facts

BOUNDS = {"obs_min": [-1.0] * 11, "obs_max": [1.0] * 11, "action_min": [-1.0] * 3, "action_max": [1.0] * 3}


def bounds_file(path, **changes):
    np.savez(path, **{key: np.asarray(value, np.float32) for key, value in (BOUNDS | changes).items()})
    return path


@pytest.fixture
def evaluation(tmp_path):
    return config(EVALUATE, tmp_path / "log", f"normalization_path={bounds_file(tmp_path / 'normalization.npz')}")


def checkpoint_of(cfg, **metadata):
    """A policy's checkpoint whose facts are those of a run."""
    from omegaconf import OmegaConf

    facts = {"normalization": BOUNDS, "config": OmegaConf.to_container(cfg, resolve=True)}
    return Checkpoint({}, facts | metadata)


def change(checkpoint, key, value):
    node = checkpoint.metadata["config"]
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    return checkpoint


def test_what_agrees_is_silent(evaluation, caplog):
    run_facts.compare_policy(checkpoint_of(evaluation), evaluation, "p", evaluating=True)
    rounded = {key: np.float32(np.asarray(value) * 1.00001).tolist() for key, value in BOUNDS.items()}
    run_facts.compare_policy(checkpoint_of(evaluation, normalization=rounded), evaluation, "p", evaluating=True)
    run_facts.compare_policy(Checkpoint({}, {}), evaluation, "of the reference, which records nothing", evaluating=True)
    assert not caplog.records


def test_other_bounds_are_an_error_in_an_evaluation_and_a_warning_in_fine_tuning(evaluation, caplog):
    other = checkpoint_of(evaluation, normalization=BOUNDS | {"obs_max": [1.0] * 4 + [2.0] + [1.0] * 6})
    message = (
        "p was trained with another normalization than .*normalization.npz: obs 4 from -1 to 2 there, from -1 to 1 here"
    )
    with pytest.raises(UserError, match=message):
        run_facts.compare_policy(other, evaluation, "p", evaluating=True)
    run_facts.compare_policy(other, evaluation, "p", evaluating=False)
    assert re.search(message, caplog.text)


@pytest.mark.parametrize(
    ("theirs", "outcome"),
    [
        ("halfcheetah-medium-v2", "error"),
        ("walker2d-medium-v2", "error"),
        ("hopper-expert-v2", "silence"),
        ("mine:Hopper-v0", "warning"),
    ],
)
def test_the_task(evaluation, theirs, outcome, caplog):
    other = change(checkpoint_of(evaluation), "env.name", theirs)
    if outcome == "error":
        with pytest.raises(UserError, match=f"the task {theirs}, this run's is hopper-medium-v2"):
            run_facts.compare_policy(other, evaluation, "p", evaluating=True)
        run_facts.compare_policy(other, evaluation, "p", evaluating=False)
    else:
        run_facts.compare_policy(other, evaluation, "p", evaluating=True)
    assert (theirs in caplog.text) == (outcome != "silence")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("hopper-medium-v2", "hopper-medium-expert-v2", True),
        ("hopper-medium-v2", "walker2d-medium-v2", False),
        ("maze2d-umaze-v1", "maze2d-large-v1", False),
        ("mine", "mine", True),
        ("mine", "hopper-medium-v2", None),
    ],
)
def test_names_of_one_task(one, other, same, caplog):
    assert same_task(one, other) is same
    experiment = files.Experiment(None, {}, "", 0, Path("folder"), one)
    if same is False:
        with pytest.raises(UserError, match=f"folder was trained on {one}, which is another task than {other}"):
            experiment.require_task(other)
    else:
        experiment.require_task(other)
    assert ("trained on" in caplog.text) == (same is None)


@pytest.mark.parametrize("evaluating", [True, False])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.network.activation_type", "Mish", "activation_type=Mish of its network"),
        ("model.network.residual_style", False, "residual_style=False of its network"),
        (
            "model.network._target_",
            "diffusion_rl.networks.unet1d.Unet1D",
            "the network diffusion_rl.networks.unet1d.Unet1D",
        ),
    ],
)
def test_another_network_is_an_error(evaluation, evaluating, key, value, message):
    with pytest.raises(UserError, match=message):
        run_facts.compare_policy(change(checkpoint_of(evaluation), key, value), evaluation, "p", evaluating)


def test_an_argument_left_out_has_its_default(evaluation):
    other = checkpoint_of(evaluation)
    assert evaluation.model.network.activation_type == "ReLU"
    del other.metadata["config"]["model"]["network"]["activation_type"]  # whose default is Mish
    with pytest.raises(UserError, match="activation_type=Mish of its network, this run has ReLU"):
        run_facts.compare_policy(other, evaluation, "p", evaluating=True)


def test_what_the_network_predicts(evaluation):
    with pytest.raises(UserError, match="model.predict_epsilon=False, this run has True"):
        other = checkpoint_of(evaluation, sampling={"predict_epsilon": False})
        run_facts.compare_policy(other, evaluation, "p", evaluating=True)


def test_shipped_policies_fit_their_own_bounds():
    for path in sorted((REPOSITORY / "data").rglob("pre_*.safetensors")):
        checkpoint, beside = load_checkpoint(path), path.with_name("normalization.npz")
        assert not list(run_facts.bounds_difference(checkpoint, str(beside))), path


# Resuming


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("ft_denoising_steps=1", "ft_denoising_steps=2"),
        ("seed=7", "seed=42"),
        ("act_steps=2", "act_steps=4"),
        ("model.actor.activation_type=Mish", "model.actor.activation_type=ReLU"),
        ("model.use_ddim=true", "model.use_ddim=False"),
        ("train.reward_scale_running=false", "train.reward_scale_running=True"),
        ("base_policy_path=other.pt", "base_policy_path=x.pt"),
        ("env.name=walker2d-medium-v2", "env.name=hopper-medium-v2"),
    ],
)
def test_a_setting_that_resuming_cannot_change_is_refused(tmp_path, override, key):
    go_through(tmp_path / "run", [0, 1], 1)
    changes = [f"++{override}" if override.startswith("model.use") else override]
    with pytest.raises(UserError, match=re.escape(f"that run has {key}") + "|" + re.escape(f", {key}")):
        go_through(tmp_path / "run", [2], 1, str(tmp_path / "run"), lambda opened: None, *changes)


def test_settings_that_take_effect_are_said(tmp_path, caplog):
    go_through(tmp_path / "run", [0, 1], 1)
    with caplog.at_level(logging.WARNING):
        go_through(
            tmp_path / "run",
            [2],
            1,
            str(tmp_path / "run"),
            lambda opened: None,
            "train.n_train_itr=9",
            "train.gamma=0.9",
        )
    assert "train.n_train_itr=9 (was 4)" in caplog.text and "train.gamma=0.9 (was 0.99)" in caplog.text


def test_resuming_with_the_same_settings_or_files_moved_says_nothing(tmp_path, caplog):
    go_through(tmp_path / "run", [0, 1], 1)
    moved = "base_policy_path=/elsewhere/y/x.pt"
    with pytest.raises(UserError, match="base_policy_path"):  # another folder's file of that name
        go_through(tmp_path / "run", [2], 1, str(tmp_path / "run"), lambda opened: None, moved)
    caplog.clear()
    go_through(tmp_path / "run", [2], 1, str(tmp_path / "run"))
    assert "resumed with" not in caplog.text


def test_a_learning_rate_changed_on_resuming_takes_effect_at_once():
    def schedule(top):
        return CosineWarmupRestarts(first_cycle_steps=20, max_lr=top, min_lr=1e-5, warmup_steps=2)

    before, same, lower = schedule(1e-3), schedule(1e-3), schedule(1e-4)
    for _ in range(5):
        before.step()
    same.restore(before.state())
    assert same.state() == before.state()
    lower.restore(before.state())
    assert lower.lr == pytest.approx(1e-5 + (before.lr - 1e-5) * (1e-4 - 1e-5) / (1e-3 - 1e-5))


# Checkpoints and episodes


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    for n in (1, 3, 2):
        save_checkpoint(tmp_path / f"run/checkpoint/state_{n}.safetensors", {"model.x": np.full(1, n)}, {"kind": "x"})
    assert open_checkpoint(tmp_path / "run").tensors["model.x"] == 3
    assert open_checkpoint(tmp_path / "run/checkpoint").tensors["model.x"] == 3
    with pytest.raises(UserError, match="no checkpoint in this folder"):
        open_checkpoint(tmp_path)


def test_the_bounds_of_a_data_file_of_any_name_stand_beside_it(tmp_path):
    data = make_data(tmp_path / "data/demos.npz")
    bounds_file(tmp_path / "data/normalization.npz")
    built = loop(PRE_TRAIN, tmp_path / "log", f"train_dataset_path={data}")
    assert built.state()[1]["normalization"] == BOUNDS
    assert normalization_facts(tmp_path / "nowhere.npz") is None


def test_without_an_episode_nothing_was_measured():
    rollout = Rollout({}, {}, np.ones((5, 2)), np.zeros((5, 2)), np.eye(6, 2) * 0 + np.array([[1]] + [[0]] * 5))
    stats = episode_statistics(rollout, 4, 3)
    assert stats.measured() == {"episode_return": None, "best_reward": None, "success_rate": None}


def test_training_and_evaluating_without_an_episode_say_so(tmp_path, caplog, capsys):
    base = make_base_policy(tmp_path / "base.safetensors")
    overrides = (f"base_policy_path={base}", "env.max_episode_steps=1000", "train.n_train_itr=1", "train.n_steps=2")
    run(FINE_TUNE, tmp_path / "train", *overrides)
    assert (
        "within train.n_steps=2 chunks of 4 actions" in caplog.text
        and rows(tmp_path / "train")[0]["episode_return"] is None
    )
    run(EVALUATE, tmp_path / "eval", f"base_policy_path={base}", "env.max_episode_steps=1000", "n_steps=2")
    row = rows(tmp_path / "eval")[0]
    assert row["episodes"] == 0 and row["episode_return"] is None and row["success_rate"] is None
    assert "raise n_steps" in capsys.readouterr().out
    assert np.isnan(np.load(tmp_path / "eval/result.npz")["eval_success_rate"])
