"""Stopped and resumed is the same as never stopped, to the bit; what was trained is what is evaluated."""

import logging
import shutil

import numpy as np
import pytest
from omegaconf import OmegaConf

from diffusion_rl.core.errors import UserError
from diffusion_rl.loops import run_folder
from diffusion_rl.loops.run_folder import RunFolder
from diffusion_rl.loops.run_state import load_checkpoint

from tests.small_runs import (
    EVALUATE,
    FINE_TUNE,
    PRE_TRAIN,
    assert_same_checkpoint,
    config,
    loop,
    make_base_policy,
    make_data,
    rows,
    run,
    states,
)

DDIM = [
    *("+model.use_ddim=true", "+model.ddim_steps=3", "ft_denoising_steps=2", "+model.learn_eta=true"),
    *(
        "+model.eta._target_=diffusion_rl.networks.eta.EtaStateAction",
        "+model.eta.input_dim=11",
        "+model.eta.action_dim=3",
    ),
    *("+model.eta.mlp_dims=[8,8]", "+train.eta_lr=1e-3", "+train.eta_weight_decay=0", "+train.max_grad_norm=1"),
    *("+train.eta_lr_scheduler.first_cycle_steps=100", "+train.eta_lr_scheduler.warmup_steps=2"),
    *("+train.eta_lr_scheduler.min_lr=1e-4", "+train.eta_update_interval=2"),
]
VARIANTS = {
    "DDPM, with evaluations": [],
    "critic warm-up, history, episodes cut at every iteration": [
        *("train.n_critic_warmup_itr=3", "cond_steps=2", "env.reset_at_iteration=true", "train.val_freq=100"),
    ],
    "DDIM with learned eta": DDIM,
    "annealed fine-tuned steps": [
        *("ft_denoising_steps=3", "+model.ft_denoising_steps_d=1", "+model.ft_denoising_steps_t=2"),
        *("train.val_freq=100", "+train.use_bc_loss=true", "+train.bc_loss_coeff=0.1"),
    ],
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    one = make_base_policy(folder / "one.safetensors")
    return {1: one, 2: make_base_policy(folder / "two.safetensors", "cond_steps=2")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "train.npz")


def last(folder, n):
    return folder / "checkpoint" / f"state_{n}.safetensors"


@pytest.mark.parametrize("variant", VARIANTS)
def test_fine_tuning_resumed_equals_fine_tuning_at_once(tmp_path, policies, variant):
    base = policies[2 if "cond_steps=2" in VARIANTS[variant] else 1]
    overrides = [*VARIANTS[variant], f"base_policy_path={base}"]
    run(FINE_TUNE, tmp_path / "whole", *overrides)
    run(FINE_TUNE, tmp_path / "halves", *overrides, "train.n_train_itr=2")
    assert len(rows(tmp_path / "halves")) == 2
    run(FINE_TUNE, tmp_path / "halves", *overrides, "resume=auto")
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    assert_same_checkpoint(last(tmp_path / "whole", 3), last(tmp_path / "halves", 3))
    kinds = [row["kind"] for row in rows(tmp_path / "whole")]
    assert kinds == (["train"] * 4 if "train.val_freq=100" in overrides else ["eval", "train", "train", "eval"])
    tensors = load_checkpoint(last(tmp_path / "whole", 3)).tensors
    moved = [n for n, v in tensors.items() if n.startswith("optimizer.actor.exp_avg.") and np.abs(v).max() > 0]
    assert moved, "the policy was trained at all"


def test_pre_training_resumed_equals_pre_training_at_once(tmp_path, data):
    overrides = [f"train_dataset_path={data}"]
    run(PRE_TRAIN, tmp_path / "whole", *overrides)
    run(PRE_TRAIN, tmp_path / "again", *overrides)
    run(PRE_TRAIN, tmp_path / "halves", *overrides, "train.n_epochs=2")
    run(PRE_TRAIN, tmp_path / "halves", *overrides, "resume=auto")
    for other in ("again", "halves"):
        assert rows(tmp_path / other) == rows(tmp_path / "whole")
        assert_same_checkpoint(last(tmp_path / "whole", 4), last(tmp_path / other, 4))
    assert [row["validation_loss"] is not None for row in rows(tmp_path / "whole")] == [False, True, False, True]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path, policies):
    overrides = [f"base_policy_path={policies[1]}", "train.n_train_itr=2"]
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        run(FINE_TUNE, tmp_path / name, *overrides, f"seed={seed}")
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")
    assert_same_checkpoint(last(tmp_path / "a", 1), last(tmp_path / "b", 1))


def test_environments_that_cannot_be_restored_begin_anew_and_the_metrics_say_so(
    tmp_path, policies, caplog, monkeypatch
):
    from diffusion_rl.envs.locomotion import LocomotionVectorEnv

    monkeypatch.setattr(LocomotionVectorEnv, "restorable", False)
    overrides = [f"base_policy_path={policies[1]}", "train.val_freq=100"]
    run(FINE_TUNE, tmp_path / "run", *overrides, "train.n_train_itr=1")
    with caplog.at_level(logging.WARNING):
        run(FINE_TUNE, tmp_path / "run", *overrides, "train.n_train_itr=3", "resume=auto")
    assert "cannot be restored" in caplog.text
    assert [row.get("resumed_without_simulator_state") for row in rows(tmp_path / "run")] == [None, True, None]
    assert not [n for n in load_checkpoint(last(tmp_path / "run", 2)).tensors if n.startswith("train.env.")]


@pytest.mark.parametrize("variant", ["DDPM, with evaluations", "DDIM with learned eta"])
def test_what_was_saved_evaluates_to_what_the_training_evaluated(tmp_path, policies, variant):
    """Long enough for episodes to end, and for noise beyond the training's clip at 3 to occur."""
    length = ["env.n_envs=4", "env.max_episode_steps=60", "seed=3"]
    tuned = [f"base_policy_path={policies[1]}", "train.n_steps=40", "train.n_train_itr=4", *VARIANTS[variant], *length]
    run(FINE_TUNE, tmp_path / "tuned", *tuned)
    checkpoint = f"base_policy_path={last(tmp_path / 'tuned', 3)}"
    stats = loop(EVALUATE, tmp_path / "eval", checkpoint, "n_steps=40", *length).run()
    trained = rows(tmp_path / "tuned")[3]
    (alone,) = rows(tmp_path / "eval")
    assert trained["kind"] == "eval" and stats.n_episodes > 4
    for key in ("episodes", "episode_return", "best_reward", "success_rate"):
        assert alone[key] == trained[key], key
    saved = OmegaConf.to_container(OmegaConf.load(tmp_path / "eval" / "config.yaml"))
    assert saved["n_steps"] == 40 and saved["base_policy_path"] == str(last(tmp_path / "tuned", 3))


# --- which checkpoints there are ---------------------------------------------------------------------------------------


def test_passing_checkpoints_go_when_a_newer_one_is_written_also_by_a_later_process(tmp_path, policies, monkeypatch):
    monkeypatch.setattr(run_folder, "CHECKPOINT_SECONDS", -1.0)  # one after every iteration
    folder, overrides = tmp_path / "run", [f"base_policy_path={policies[1]}", "train.save_model_freq=4"]
    seen = []
    save = RunFolder._save

    def watched(self, keep):
        save(self, keep)
        seen.append(states(folder))

    monkeypatch.setattr(RunFolder, "_save", watched)
    stopped = loop(FINE_TUNE, folder, *overrides, "train.n_train_itr=9")

    def stop_after_two(self):
        if stopped.itr == 3:
            raise RuntimeError("the machine goes down")

    monkeypatch.setattr(RunFolder, "stop_if_requested", stop_after_two)
    with pytest.raises(RuntimeError):
        stopped.run()
    assert states(folder) == ["state_0.safetensors", "state_2.safetensors"]
    run(FINE_TUNE, folder, *overrides, "train.n_train_itr=7", "resume=auto")
    names = [[name.removeprefix("state_").removesuffix(".safetensors") for name in there] for there in seen]
    assert names == [["0"], ["0", "1"], ["0", "2"], ["0", "3"], ["0", "4"], ["0", "4", "5"], ["0", "4", "6"]]


def test_resuming_from_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path, policies):
    folder, overrides = tmp_path / "run", [f"base_policy_path={policies[1]}", "train.save_model_freq=1"]
    run(FINE_TUNE, folder, *overrides)
    before = rows(folder)
    run(FINE_TUNE, tmp_path / "unused", *overrides, f"resume={last(folder, 1)}", "train.n_train_itr=3")
    assert not (tmp_path / "unused").exists()
    assert rows(folder) == before[:3]
    assert states(folder) == [
        *("set_aside_state_2.safetensors", "set_aside_state_3.safetensors"),
        *("state_0.safetensors", "state_1.safetensors", "state_2.safetensors"),
    ]


def test_a_lone_checkpoint_goes_on_in_a_folder_of_its_own(tmp_path, policies):
    run(FINE_TUNE, tmp_path / "run", f"base_policy_path={policies[1]}", "train.n_train_itr=1")
    lone = shutil.copy(last(tmp_path / "run", 0), tmp_path / "mine.safetensors")
    before = rows(tmp_path / "run")
    run(FINE_TUNE, tmp_path / "other", f"base_policy_path={policies[1]}", "train.n_train_itr=2", f"resume={lone}")
    assert [row["itr"] for row in rows(tmp_path / "other")] == [1] and rows(tmp_path / "run") == before
    assert not (tmp_path / "checkpoint").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_auto_takes_the_newest_folder_of_the_same_name_and_seed(tmp_path, policies):
    overrides = [f"base_policy_path={policies[1]}"]
    run(FINE_TUNE, tmp_path / "2026-01-01_42", *overrides, "train.n_train_itr=1")
    run(FINE_TUNE, tmp_path / "2026-01-02_42", *overrides, "train.n_train_itr=1")
    (tmp_path / "2026-01-03_42" / "checkpoint").mkdir(parents=True)  # killed before its first checkpoint
    run(FINE_TUNE, tmp_path / "2026-01-04_42", *overrides, "train.n_train_itr=2", "resume=auto")
    assert [len(rows(tmp_path / f"2026-01-0{day}_42")) for day in (1, 2)] == [1, 2]
    assert not (tmp_path / "2026-01-04_42").exists()


def test_a_folder_that_holds_a_run_is_not_started_over(tmp_path, policies):
    cfg = config(FINE_TUNE, tmp_path / "run", "train.n_train_itr=1", f"base_policy_path={policies[1]}")
    with RunFolder(cfg, "itr", "dppo") as folder:
        folder.metrics.write({"itr": 0, "kind": "train"})
    before = {path.name for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(UserError, match="run holds a run already: go on with it .resume=auto. or name another"):
        RunFolder(cfg, "itr", "dppo")
    assert {path.name for path in (tmp_path / "run").rglob("*")} == before
    cfg.resume = "auto"  # it has no checkpoint: begun anew, and what the metrics hold will come again
    with RunFolder(cfg, "itr", "dppo") as folder:
        assert folder.resumed is None and folder.metrics.rows == []
