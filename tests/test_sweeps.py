"""`-m`: folders of the jobs, several configurations at once, and failures that stop no other job."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_rl.cli import app
from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.core.errors import Interrupted, UserError

HOPPER = ["--config-dir=cfg/gym/finetune/hopper-v2", "--config-name=ft_ppo_diffusion_mlp"]
NAME = "hopper-medium-v2_ppo_diffusion_mlp_ta4_td20_tdf10"


class Loop:
    """Stands for a loop: remembers its configuration, fails where told to, leaves a file in the run folder."""

    seen: list = []
    failures: dict = {}

    def __init__(self, config):
        self.config = config

    def run(self):
        Loop.seen.append(self.config)
        if self.config.seed in Loop.failures:
            raise Loop.failures[self.config.seed]
        Path(self.config.logdir).mkdir(parents=True)


@pytest.fixture
def sweep(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("DPPO_LOG_DIR", str(tmp_path))
    monkeypatch.setattr(Loop, "seen", [])
    monkeypatch.setattr(Loop, "failures", {})
    # Hydra sets logging up anew and shuts every handler down; absl's then closes the stream that pytest captures with.
    monkeypatch.setattr(logging, "_handlerList", [])
    monkeypatch.setitem(sys.modules, "own_package", sys.modules[__name__])

    def run(*arguments, configuration=HOPPER):
        status = app.main([*configuration, "_target_=own_package.Loop", *arguments])
        return status, capsys.readouterr().err

    return run


def test_seeds_share_a_name_and_other_keys_are_part_of_it(sweep, tmp_path):
    status, err = sweep("-m", "seed=0,1", "train.gamma=0.9,0.99", "train.n_steps=7")
    assert status == 0, err
    assert [(config.name, config.seed) for config in Loop.seen] == [
        (f"{NAME},train.gamma={gamma}", seed) for seed in (0, 1) for gamma in (0.9, 0.99)
    ]
    folders = [Path(config.logdir) for config in Loop.seen]
    assert len(set(folders)) == 4 and all(folder.is_dir() for folder in folders)
    assert {folder.parent.parent for folder in folders} == {tmp_path / "gym-finetune"}


def test_paths_do_not_become_folders(sweep):
    status, err = sweep("-m", "base_policy_path=a/b.pt,/c.pt")
    assert status == 0, err
    assert [config.name for config in Loop.seen] == [f"{NAME},base_policy_path={p}" for p in ("a-b.pt", "-c.pt")]


def test_one_folder_for_all_jobs_is_refused_before_anything_runs(sweep, tmp_path):
    status, err = sweep("-m", "seed=0,1", f"logdir={tmp_path}/x")
    assert status == 2 and "one folder for all jobs" in err and err.count("\n") == 1 and not Loop.seen
    status, err = sweep("-m", "seed=0,1", f"logdir='{tmp_path}/x_${{seed}}'")
    assert status == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["multirun", "x_0", "x_1"]


@pytest.mark.parametrize("failure", [UserError("the data is gone"), RuntimeError("a defect")])
def test_a_job_that_fails_stops_no_other_and_the_status_says_so(sweep, failure):
    Loop.failures = {0: failure}
    status, err = sweep("-m", "seed=0,1,2")
    assert status == 2
    assert [config.seed for config in Loop.seen] == [0, 1, 2]
    assert str(failure) in err and ("Traceback" in err) == isinstance(failure, RuntimeError)
    assert err.splitlines()[-1] == "error: job 0 (seed=0) failed, see above; the other jobs went on"


def test_stopping_stops_the_whole_sweep(sweep):
    Loop.failures = {1: Interrupted("stopped; state saved")}
    status, err = sweep("-m", "seed=0,1,2")
    assert status == 130 and "stopped; state saved" in err
    assert [config.seed for config in Loop.seen] == [0, 1]


def test_several_configurations(sweep):
    folders = "--config-dir=cfg/gym/finetune/hopper-v2,cfg/gym/finetune/walker2d-v2"
    Loop.failures = {0: UserError("the data is gone")}
    status, err = sweep("-m", "seed=0,1", configuration=[folders, HOPPER[1]])
    assert status == 2
    assert [(config.env_name, config.seed) for config in Loop.seen] == [
        (f"{task}-medium-v2", seed) for task in ("hopper", "walker2d") for seed in (0, 1)
    ]


def test_a_wrong_name_among_several_is_found_before_the_first_run(sweep):
    folders = "--config-dir=cfg/gym/finetune/hopper-v2,cfg/gym/finetune/waker2d-v2"
    status, err = sweep("-m", "seed=0,1", configuration=[folders, HOPPER[1]])
    assert status == 2 and "did you mean cfg/gym/finetune/walker2d-v2" in err and not Loop.seen


@pytest.mark.slow
def test_jobs_in_processes_of_their_own(tmp_path):
    """With the joblib launcher: a job that fails at once, two that train, no folder shared."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason='needs pip install -e ".[sweep]"')
    tiny = ["train.n_train_itr=1", "train.n_steps=2", "env.n_envs=2", "train.batch_size=16", "train.update_epochs=1"]
    small = ["model.actor.mlp_dims=[16,16,16]", "model.critic.mlp_dims=[16,16,16]"]
    scratch = ["--config-dir=cfg/gym/scratch/hopper-v2", "--config-name=ppo_diffusion_mlp"]
    ended = subprocess.run(
        [sys.executable, "script/run.py", *scratch, *tiny, *small, "-m", "seed=0,1", "obs_dim=11,12"]
        + ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        cwd=REPOSITORY,
        env=os.environ | {"DPPO_LOG_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("normalization.npz is for obs_dim=11") == 2, ended.stderr
    assert "job 1 (seed=0 obs_dim=12) failed" in ended.stderr.splitlines()[-1]
    finished = sorted(path.parent for path in tmp_path.glob("gym-*/*/*/metrics.jsonl"))
    assert [path.name[-2:] for path in finished] == ["_0", "_1"]
    assert all(path.parent.name.endswith(",obs_dim=11") for path in finished)
