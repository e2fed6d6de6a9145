"""Stopped and resumed is the same as never stopped, to the bit; what was trained is what is evaluated."""

import logging
import shutil
import signal

import numpy as np
import pytest
from omegaconf import OmegaConf
from tests.small_runs import (
    EVALUATE,
    FINE_TUNE,
    PRE_TRAIN,
    assert_same_checkpoint,
    go_through,
    loop,
    make_base_policy,
    make_data,
    rows,
    run,
    states,
)

from diffusion_rl.core.errors import Interrupted, UserError
from diffusion_rl.envs.locomotion import LocomotionVectorEnv
from diffusion_rl.training import run_dir
from diffusion_rl.training.checkpoint import load_checkpoint

DDIM = [
    *("+train.fast=false", "cond_steps=2", "train.n_critic_warmup_itr=2", "env.reset_at_iteration=true"),
    *("+model.use_ddim=true", "+model.ddim_steps=3", "+model.learn_eta=true", "+train.max_grad_norm=1"),
    *("+model.eta._target_=diffusion_rl.networks.eta.EtaStateAction", "+model.eta.input_dim=22"),
    *("+model.eta.action_dim=3", "+model.eta.mlp_dims=[8,8]", "+train.eta_lr=1e-3", "+train.eta_weight_decay=0"),
    *("+train.eta_lr_scheduler.first_cycle_steps=100", "+train.eta_lr_scheduler.warmup_steps=2"),
    *("+train.eta_lr_scheduler.min_lr=1e-4", "+train.eta_update_interval=2"),
]
ANNEALING = [
    *("+train.fast=false", "ft_denoising_steps=3", "+model.ft_denoising_steps_d=1", "+model.ft_denoising_steps_t=2"),
    *("+train.force_train=true", "+train.use_bc_loss=true", "+train.bc_loss_coeff=0.1"),
    "+model.train_after_annealing=true",
]
# The fast form, deciding in two parts, with evaluations; DDIM with a learned eta, history, critic warm-up, resets;
# annealed steps, BC loss.
VARIANTS = {"DDPM": ["env.n_envs=16"], "DDIM": DDIM, "annealing": ANNEALING}
LONG = ["env.n_envs=4", "env.max_episode_steps=28", "train.n_steps=24"]  # some episodes end


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """variant -> (overrides, folder) of an uninterrupted run of four iterations that keeps every checkpoint."""
    folder, done = tmp_path_factory.mktemp("whole"), {}

    def run_once(variant):
        if variant not in done:
            history = [o for o in VARIANTS[variant] if o.startswith("cond_steps")]
            base = make_base_policy(folder / f"{variant}.safetensors", *history)
            overrides = [*LONG, *VARIANTS[variant], f"base_policy_path={base}", "train.save_model_freq=1"]
            run(FINE_TUNE, folder / variant, *overrides)
            done[variant] = (overrides, folder / variant)
        return done[variant]

    return run_once


def copy_until(folder, n, to):
    """The run as it stood when checkpoint n had just been written, but for metrics that had run ahead."""
    shutil.copytree(folder, to)
    for path in (to / "checkpoint").iterdir():
        if int(path.stem.removeprefix("state_")) > n:
            path.unlink()


def state(folder, n):
    return folder / "checkpoint" / f"state_{n}.safetensors"


def stop_after(monkeypatch, cls, method, n, number=signal.SIGINT):
    """Send this process a signal when `cls.method` has been called n times."""
    original, calls = getattr(cls, method), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == n:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(cls, method, counted)
    return calls


def test_stopped_in_the_middle_of_an_iteration_and_resumed_equals_never_stopped(tmp_path, whole, monkeypatch):
    overrides, folder = whole("DDPM")
    with monkeypatch.context() as context:
        calls = stop_after(context, LocomotionVectorEnv, "step", 24 * 2 + 5)
        with pytest.raises(Interrupted, match=r"stopped by SIGINT; state saved in .*state_1.safetensors; go on with"):
            run(FINE_TUNE, tmp_path, *overrides, "train.save_model_freq=100")
        assert len(calls) <= 24 * 2 + 5 + 1, "at most one step late"
    assert rows(tmp_path) == rows(folder)[:2]
    assert states(tmp_path) == ["state_0.safetensors", "state_1.safetensors"]
    run(FINE_TUNE, tmp_path, *overrides, "resume=auto", "train.save_model_freq=100")
    assert rows(tmp_path) == rows(folder)
    assert states(tmp_path) == ["state_0.safetensors", "state_3.safetensors"]  # 1 was a passing one
    assert_same_checkpoint(state(folder, 3), state(tmp_path, 3))


@pytest.mark.parametrize("variant", ["DDIM", pytest.param("annealing", marks=pytest.mark.slow)])
def test_fine_tuning_resumed_equals_fine_tuning_at_once(tmp_path, whole, variant):
    overrides, folder = whole(variant)
    halves = tmp_path / "halves"
    copy_until(folder, 1, halves)
    run(FINE_TUNE, halves, *overrides, "resume=auto")
    assert rows(halves) == rows(folder)
    assert states(halves) == states(folder)
    assert_same_checkpoint(state(folder, 3), state(halves, 3))


def test_the_variants_exercise_what_they_are_for(whole):
    def tensors(variant, n=3):
        return load_checkpoint(state(whole(variant)[1], n)).tensors

    for variant in VARIANTS:
        assert np.abs(tensors(variant)["optimizer.actor.exp_avg.0"]).max() > 0
    assert [row["kind"] for row in rows(whole("DDPM")[1])] == ["eval", "train", "train", "eval"]
    assert np.abs(tensors("DDIM")["optimizer.eta.exp_avg.0"]).max() > 0
    assert not np.abs(tensors("DDIM", 1)["optimizer.actor.exp_avg.0"]).max()  # the critic was still warming up
    facts = [load_checkpoint(state(whole("annealing")[1], n)).metadata for n in range(4)]
    assert [f["ft_denoising_steps"] for f in facts] == [3, 2, 2, 1]
    scalers = [f["train"]["reward_scaler"]["count"] for f in facts]
    assert scalers == sorted(set(scalers))
    assert len({str(f["train"]["noise"]) for f in facts}) == 4


def test_pre_training_resumed_equals_pre_training_at_once(tmp_path):
    overrides = [f"train_dataset_path={make_data(tmp_path / 'train.npz')}", "train.save_model_freq=1"]
    run(PRE_TRAIN, tmp_path / "whole", *overrides)
    copy_until(tmp_path / "whole", 2, tmp_path / "halves")
    run(PRE_TRAIN, tmp_path / "halves", *overrides, "resume=auto")
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    assert_same_checkpoint(state(tmp_path / "whole", 4), state(tmp_path / "halves", 4))
    assert [row["validation_loss"] is not None for row in rows(tmp_path / "whole")] == [False, True, False, True]


def test_environments_that_cannot_be_restored_begin_anew_and_the_metrics_say_so(tmp_path, whole, caplog, monkeypatch):
    overrides, folder = whole("DDPM")
    monkeypatch.setattr(LocomotionVectorEnv, "restorable", False)
    copy_until(folder, 0, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        run(FINE_TUNE, tmp_path / "run", *overrides, "train.n_train_itr=3", "resume=auto", "+train.fast=false")
    assert "cannot be restored" in caplog.text
    assert [row.get("resumed_without_simulator_state") for row in rows(tmp_path / "run")] == [None, True, None]
    assert not [n for n in load_checkpoint(state(tmp_path / "run", 2)).tensors if n.startswith("train.env.")]


@pytest.mark.parametrize("variant", ["DDPM", "DDIM"])
def test_what_was_saved_evaluates_to_what_the_training_evaluated(tmp_path, whole, variant):
    """Though the training clips noise at 3, which the evaluation's own configuration does not: the checkpoint knows."""
    overrides, folder = whole(variant)
    same = [o for o in overrides if o.startswith(("env.n_envs", "env.max_episode_steps", "cond_steps"))]
    stats = loop(EVALUATE, tmp_path, f"base_policy_path={state(folder, 3)}", "n_steps=24", *same).run()
    trained = rows(folder)[3]
    (alone,) = rows(tmp_path)
    assert trained["kind"] == "eval" and stats.n_episodes >= 4
    for key in ("episodes", "episode_return", "best_reward", "success_rate"):
        assert alone[key] == trained[key], key
    saved = OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"))
    assert saved["n_steps"] == 24 and saved["base_policy_path"] == str(state(folder, 3))


# --- which checkpoints there are


def test_passing_checkpoints_go_when_a_newer_one_is_there_also_those_of_an_earlier_process(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "CHECKPOINT_SECONDS", -1.0)  # one after every step
    assert go_through(tmp_path, range(3), keep_every=4) == [[0], [0, 1], [0, 2]]
    written = go_through(tmp_path, range(3, 7), keep_every=4, resume="auto")
    assert written == [[0, 3], [0, 4], [0, 4, 5], [0, 4, 6]]
    assert [row["itr"] for row in rows(tmp_path)] == list(range(7))
    assert load_checkpoint(state(tmp_path, 6)).tensors["model.x"][0] == 6


def test_stopping_after_a_kept_checkpoint_does_not_make_it_a_passing_one(tmp_path):
    def interrupted(folder):
        signal.raise_signal(signal.SIGTERM)
        folder.stop_if_requested()

    with pytest.raises(Interrupted, match="SIGTERM; state saved in .*state_0.safetensors"):
        go_through(tmp_path, [0], keep_every=1, then=interrupted)
    assert load_checkpoint(state(tmp_path, 0)).metadata["keep"] is True


def test_a_newer_checkpoint_is_whole_before_the_passing_one_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "CHECKPOINT_SECONDS", -1.0)
    go_through(tmp_path, range(3), keep_every=4)

    def full_disk(path, tensors, metadata):
        raise UserError("No space left on device")

    monkeypatch.setattr(run_dir, "save_checkpoint", full_disk)
    with pytest.raises(UserError, match="No space"):
        go_through(tmp_path, [3], keep_every=4, resume="auto")
    assert states(tmp_path) == ["state_0.safetensors", "state_2.safetensors"]


def test_resuming_from_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path):
    go_through(tmp_path / "run", range(4), keep_every=1)
    go_through(tmp_path / "unused", [2], keep_every=1, resume=str(state(tmp_path / "run", 1)))
    assert not (tmp_path / "unused").exists()
    assert [row["itr"] for row in rows(tmp_path / "run")] == [0, 1, 2]
    aside = ["set_aside_state_2.safetensors", "set_aside_state_3.safetensors"]
    assert states(tmp_path / "run") == [*aside, *(f"state_{n}.safetensors" for n in range(3))]


def test_a_lone_checkpoint_goes_on_in_a_folder_of_its_own(tmp_path):
    go_through(tmp_path / "run", [0], keep_every=1)
    lone = shutil.copy(state(tmp_path / "run", 0), tmp_path / "mine.safetensors")
    go_through(tmp_path / "other", [1], keep_every=1, resume=lone)
    assert [row["itr"] for row in rows(tmp_path / "other")] == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.safetensors", "other", "run"]


def test_auto_takes_the_newest_folder_of_the_same_name_and_seed(tmp_path):
    for day in (1, 2):
        go_through(tmp_path / f"2026-01-0{day}_42", [0], keep_every=1)
    go_through(tmp_path / "2026-01-05_43", [0], keep_every=1)  # another seed
    (tmp_path / "2026-01-03_42" / "checkpoint").mkdir(parents=True)  # killed before its first checkpoint
    go_through(tmp_path / "2026-01-04_42", [1], keep_every=1, resume="auto")
    assert [len(rows(tmp_path / f"2026-01-0{day}")) for day in ("1_42", "2_42", "5_43")] == [1, 2, 1]
    assert not (tmp_path / "2026-01-04_42").exists()


def test_a_folder_that_holds_a_run_is_not_started_over(tmp_path):
    go_through(tmp_path / "run", [0], keep_every=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="run holds a run already: go on with it .resume=auto. or name another"):
        go_through(tmp_path / "run", [0], keep_every=1)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    state(tmp_path / "run", 0).unlink()  # as after a kill before the first checkpoint
    go_through(tmp_path / "run", [0, 1], keep_every=1, resume="auto")
    assert [row["itr"] for row in rows(tmp_path / "run")] == [0, 1]


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    def intrude(opened):
        with pytest.raises(UserError, match="another process is writing to .*run: wait for it"):
            go_through(tmp_path / "run", [7], keep_every=1, resume="auto")

    go_through(tmp_path / "run", [0, 1], 1, "never", intrude)
    go_through(tmp_path / "run", [2], keep_every=1, resume="auto")
    assert [row["itr"] for row in rows(tmp_path / "run")] == [0, 1, 2]


def test_another_number_of_environments_goes_on_with_new_episodes(tmp_path, caplog):
    """Weights, optimizers and the statistics of rewards go on; a row says that episodes began anew."""
    base = make_base_policy(tmp_path / "base.safetensors")
    same = [f"base_policy_path={base}", "train.save_model_freq=1", "env.max_episode_steps=20", "train.val_freq=10"]
    run(FINE_TUNE, tmp_path / "run", *same, "train.n_train_itr=2", "env.n_envs=4")
    with caplog.at_level(logging.WARNING):
        on = run(FINE_TUNE, tmp_path / "run", *same, "train.n_train_itr=3", "env.n_envs=3", "resume=auto")
    assert "env.n_envs was 4, now it is 3: the run goes on with new episodes" in caplog.text
    assert [row["itr"] for row in rows(tmp_path / "run")] == [0, 1, 2] and on.observations["state"].shape[0] == 3
    assert rows(tmp_path / "run")[2]["env_steps"] == 4 * 24 + 3 * 24  # iteration 0 evaluates
