"""Whole runs and what can happen to them: each fault is provoked for real, gets one clear line, and loses nothing.

Faults of single files are in test_run_state.py (checkpoints) and test_metrics.py; mistyped keys in test_configs.py.
"""

import contextlib
import itertools
import json
import logging
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from tests.small_runs import (
    EVALUATE,
    FINE_TUNE,
    PRE_TRAIN,
    arguments,
    go_through,
    loop,
    make_base_policy,
    make_data,
    rows,
    run,
    start,
    states,
)

from diffusion_rl.cli import app
from diffusion_rl.cli.status import line_for_user
from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.core.errors import Interrupted, UserError
from diffusion_rl.envs.locomotion import LocomotionVectorEnv
from diffusion_rl.methods.on_policy.dppo import DPPOTrainer
from diffusion_rl.methods.pretraining.losses import PreTrainer
from diffusion_rl.training import signals
from diffusion_rl.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

PLAIN = "+train.fast=false"  # compiles faster


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base_policy(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    """A fine-tuning of three iterations that kept every checkpoint; copy it before doing anything to it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(FINE_TUNE, folder, f"base_policy_path={base}", PLAIN, "train.n_train_itr=3", "train.save_model_freq=1")
    return folder


def state(folder, n):
    return folder / "checkpoint" / f"state_{n}.safetensors"


def contents(folder):
    """{file below the folder: its bytes}"""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def no_nan_on_disk(folder):
    for name in states(folder):
        checkpoint = load_checkpoint(folder / "checkpoint" / name)
        assert all(np.isfinite(v).all() for k, v in checkpoint.tensors.items() if v.dtype.kind == "f"), name


def in_this_process(monkeypatch, name, logdir, *overrides):
    """The exit status of the command line."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    for function in ("hydra._internal.logging_config.configure_logging", "logging.config.dictConfig"):
        monkeypatch.setattr(function, lambda config: None, raising=False)  # it would close pytest's handlers
    return app.main(arguments(name, logdir, *overrides))


# --- signals and kills, from outside


def wait_for_rows(folder, n, process, seconds=120):
    """Until the metrics have n rows."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if (folder / "metrics.jsonl").read_bytes().count(b"\n") >= n:
                return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("the run did not get on")


@pytest.mark.slow  # within a process: test_two_signals_are_one…; killed: test_killed_at_any_moment (test_engine.py)
def test_killed_at_a_random_moment_it_goes_on_and_ends_cleanly_on_sigterm(tmp_path, base):
    """A process is killed somewhere within its iterations, saving after each; the next one is asked to stop."""
    folder, draw = tmp_path / "run", random.Random(time.time_ns())
    overrides = [f"base_policy_path={base}", PLAIN, "resume=auto", "train.n_train_itr=100000", "env.n_envs=2"]
    command = arguments(FINE_TUNE, folder, *overrides, "train.save_model_freq=1", "train.val_freq=1000")
    n = 0
    for end in (signal.SIGKILL, signal.SIGTERM):
        process = start(command)
        wait_for_rows(folder, n + 2, process)
        time.sleep(draw.uniform(0, 0.4))
        process.send_signal(end)
        _, stderr = process.communicate(timeout=60)
        newest = latest_checkpoint(folder / "checkpoint")
        itr = load_checkpoint(newest).metadata["itr"]
        whole = rows(folder)
        assert [row["itr"] for row in whole] == list(range(len(whole))) and itr in (len(whole) - 1, len(whole) - 2)
        assert len(whole) >= n + 2
        n = itr + 1
    assert process.returncode == app.INTERRUPTED
    line = stderr.strip().splitlines()[-1]
    assert line == f"stopped by SIGTERM; state saved in {newest}; go on with resume={folder}"
    assert "Traceback" not in stderr and itr == len(whole) - 1


# --- signals, from inside


def signal_at_step(monkeypatch, n, *numbers):
    original, calls = LocomotionVectorEnv.step, itertools.count(1)

    def step(self, actions):
        if next(calls) == n:
            for number in numbers:
                signal.raise_signal(number)
        return original(self, actions)

    monkeypatch.setattr(LocomotionVectorEnv, "step", step)


def test_the_second_signal_stops_at_once_and_the_handlers_are_put_back(tmp_path, base, monkeypatch):
    monkeypatch.setattr(signals, "ONE_REQUEST_SECONDS", 0)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal_at_step(monkeypatch, 2, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(FINE_TUNE, tmp_path / "run", f"base_policy_path={base}", PLAIN)
    assert not isinstance(stopped.value, Interrupted)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_in_the_first_update_does_not_wait_for_its_end(tmp_path, base, monkeypatch):
    original, updates = DPPOTrainer.minibatch, []

    def minibatch(self, *args):
        updates.append(None)
        signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(DPPOTrainer, "minibatch", minibatch)
    with pytest.raises(Interrupted, match="stopped by SIGTERM before there was anything to save; start again"):
        run(FINE_TUNE, tmp_path / "run", f"base_policy_path={base}", PLAIN, "+train.force_train=true")
    assert len(updates) == 1 and states(tmp_path / "run") == [] and rows(tmp_path / "run") == []


def test_sigterm_before_the_loop_runs_is_an_interruption_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(app, "run", lambda config, defaults: (signal.raise_signal(signal.SIGTERM), time.sleep(5)))
    assert in_this_process(monkeypatch, FINE_TUNE, tmp_path / "log") == app.INTERRUPTED
    assert capsys.readouterr().err.startswith("interrupted") and not (tmp_path / "log").exists()


def test_pre_training_stops_within_an_epoch(tmp_path, monkeypatch):
    original, calls = PreTrainer.steps, itertools.count(1)

    def steps(self, *args):
        if next(calls) == 3:  # an epoch has two: whole batches and the rest
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(PreTrainer, "steps", steps)
    with pytest.raises(Interrupted, match="SIGINT; state saved in .*state_1.safetensors"):
        run(PRE_TRAIN, tmp_path / "run", f"train_dataset_path={make_data(tmp_path / 'train.npz')}")
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1] and next(calls) == 4


# --- damaged files


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, base, finished, damage, caplog):
    folder = shutil.copytree(finished, tmp_path / "run")
    newest = state(folder, 2)
    payload = bytearray(newest.read_bytes())
    if damage == "truncated":
        del payload[len(payload) // 2 :]
    else:
        payload[-100] ^= 1
    newest.write_bytes(payload)
    with caplog.at_level(logging.WARNING, "diffusion_rl"):
        training = loop(FINE_TUNE, folder, f"base_policy_path={base}", PLAIN, "train.n_train_itr=2", "resume=auto")
        training.run()  # to the second iteration, which is there
    warning, changed, *_ = [r.getMessage() for r in caplog.records if r.name.startswith("diffusion_rl")]
    assert changed == "resumed with train.n_train_itr=2 (was 3), train.save_model_freq=100 (was 1)"
    assert "state_2.safetensors is damaged" in warning and warning.endswith(f"continuing with {state(folder, 1)}")
    assert training.itr == 2 and rows(folder) == rows(finished)[:2]
    assert states(folder) == ["set_aside_state_2.safetensors", "state_0.safetensors", "state_1.safetensors"]


# --- a full disk


@pytest.fixture
def disk(tmp_path):
    """A file system of 512 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, timeout=10).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=10)


def fill(disk, leave):
    """Take all room but `leave` bytes."""
    free = shutil.disk_usage(disk).free
    with open(disk / "filler", "ab") as file:
        file.write(b"\0" * max(0, free - leave))


@pytest.mark.parametrize("what", ["metrics", "TensorBoard"])
def test_a_disk_without_room_for_a_line(disk, what):
    """The last page of metrics.jsonl may have room left when the disk has none: then another file fails first."""

    def fill_up(opened):
        fill(disk, 0)
        if what == "metrics":
            rest = 4096 - (disk / "run" / "metrics.jsonl").stat().st_size % 4096
            opened.metrics._jsonl.append(json.dumps({"itr": 0, "x": "y" * (rest - 22)}).encode() + b"\n")

    with pytest.raises(UserError, match="disk is full|No space left") as full:
        go_through(disk / "run", range(400), 1000, "never", fill_up, "tensorboard=true")
    assert "\n" not in str(full.value) and str(disk) in str(full.value)
    assert states(disk / "run") == ["state_0.safetensors"]
    there = rows(disk / "run")
    (disk / "filler").unlink()
    go_through(disk / "run", [1, 2], 1, "auto")
    assert [row["itr"] for row in rows(disk / "run")] == ([0] if what == "metrics" else []) + [0, 1, 2], there


def test_a_disk_that_is_full_from_the_start(disk, base):
    fill(disk, 0)
    with pytest.raises((UserError, OSError)) as full:
        run(FINE_TUNE, disk / "run", f"base_policy_path={base}", PLAIN)
    assert line_for_user(full.value) and "No space" in str(full.value)
    assert not [p for p in disk.rglob("*") if p.is_file() and p.name != "filler" and p.stat().st_size]


# --- NaN


@pytest.mark.parametrize("epochs", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_learning_rate_that_is_far_too_high(tmp_path, base, epochs):
    """With one update per iteration the loss looks fine and the weights are ruined: none of that reaches the disk."""
    folder = tmp_path / "run"
    high = ["train.actor_lr=1e38", "train.actor_lr_scheduler.min_lr=1e38", "train.batch_size=36"]
    overrides = [f"base_policy_path={base}", PLAIN, *high, f"train.update_epochs={epochs}", "train.save_model_freq=1"]
    with pytest.raises(UserError) as diverged:
        run(FINE_TUNE, folder, *overrides, "train.n_train_itr=20")
    message = str(diverged.value)
    assert "lower" in message and "\n" not in message
    no_nan_on_disk(folder)
    assert state(folder, 0).exists()


def test_nan_saves_the_last_good_iteration_which_was_not_written_yet(tmp_path, base, monkeypatch):
    folder, training = tmp_path / "run", loop(FINE_TUNE, tmp_path / "run", f"base_policy_path={base}", PLAIN)
    original = DPPOTrainer.minibatch

    def minibatch(self, *args):
        if training.itr == 2:
            self.trained["actor"][0].assign(self.trained["actor"][0] * np.nan)
        return original(self, *args)

    monkeypatch.setattr(DPPOTrainer, "minibatch", minibatch)
    with pytest.raises(UserError, match=r"_loss is nan in iteration 2: lower .*; the last good state is .*state_1.saf"):
        training.run()
    assert states(folder) == ["state_0.safetensors", "state_1.safetensors"]
    assert [row["itr"] for row in rows(folder)] == [0, 1]
    no_nan_on_disk(folder)


def test_pre_training_that_diverges(tmp_path):
    high = ["train.learning_rate=1e38", "train.lr_scheduler.min_lr=1e38", "train.save_model_freq=1"]
    data = f"train_dataset_path={make_data(tmp_path / 'train.npz')}"
    with pytest.raises(UserError, match="in epoch 1: lower train.learning_rate; nothing had been saved yet"):
        run(PRE_TRAIN, tmp_path / "run", *high, data)
    assert not (tmp_path / "run").exists()  # no row had been written


def test_a_policy_of_nan_is_not_run(tmp_path, base):
    checkpoint = load_checkpoint(base)
    checkpoint.tensors["ema.network.mlp_mean.layers.0.weight"][:] = np.nan
    save_checkpoint(tmp_path / "nan.safetensors", checkpoint.tensors, checkpoint.metadata)
    with pytest.raises(UserError, match="nan.safetensors: weight network.mlp_mean.* is not finite .*; use an earlier"):
        loop(EVALUATE, tmp_path / "eval", f"base_policy_path={tmp_path / 'nan.safetensors'}").run()
    assert not (tmp_path / "eval").exists()


def test_any_other_failure_saves_the_last_iteration_too(tmp_path):
    def die(opened):
        if opened._held and opened._held[0] == 2:
            raise UserError("environment 1 died")

    with pytest.raises(UserError, match="environment 1 died"):
        go_through(tmp_path, range(5), 100, "never", die)
    assert states(tmp_path) == ["state_0.safetensors", "state_2.safetensors"]


# --- what does not fit: one line that names the thing and the cure, status 2, nothing touched


def lone(folder, name, source=None, **metadata):
    """A checkpoint file derived from another."""
    checkpoint = load_checkpoint(source) if source else None
    tensors = dict(checkpoint.tensors) if checkpoint else {}
    save_checkpoint(folder / name, tensors, {**(checkpoint.metadata if checkpoint else {}), **metadata})
    return folder / name


def bytes_of(path, payload):
    path.write_bytes(payload)
    return path


def bounds(path, obs_dim):
    np.savez(path, obs_min=-np.ones(obs_dim), obs_max=np.ones(obs_dim), action_min=-np.ones(3), action_max=np.ones(3))
    return path


# (configuration, overrides, parts of the line); {tmp}, {base}, {data}, {run} are paths
MISFITS = {
    "truncated base policy": (FINE_TUNE, ["base_policy_path={tmp}/cut.safetensors"], ["cut.safetensors is damaged"]),
    "base policy that is rubbish": (FINE_TUNE, ["base_policy_path={tmp}/bad.pt"], ["bad.pt"]),
    "missing base policy": (FINE_TUNE, ["base_policy_path={tmp}/no.safetensors"], ["no.safetensors", "check the path"]),
    "base policy of other layers": (
        *(FINE_TUNE, ["base_policy_path={base}", "model.actor.mlp_dims=[32,32,32]"]),
        ["base.safetensors", "has shape", "this network needs"],
    ),
    "base policy of more layers": (
        *(FINE_TUNE, ["base_policy_path={base}", "model.actor.mlp_dims=[16,16,16,16,16]"]),
        ["base.safetensors", "not of this network"],
    ),
    "base policy of other denoising steps": (
        *(FINE_TUNE, ["base_policy_path={base}", "denoising_steps=6"]),
        ["base.safetensors was trained with denoising_steps=4, this run has 6: set denoising_steps=4"],
    ),
    "base policy of another horizon": (
        *(FINE_TUNE, ["base_policy_path={base}", "horizon_steps=8"]),
        ["base.safetensors was trained with horizon_steps=4", "set horizon_steps=4"],
    ),
    "base policy of another obs_dim": (FINE_TUNE, ["base_policy_path={base}", "obs_dim=12"], ["set obs_dim=11"]),
    "environment of another obs_dim": (
        *(FINE_TUNE, ["base_policy_path={base12}", "obs_dim=12", "normalization_path={tmp}/bounds12.npz"]),
        ["obs_dim=12 is wrong for hopper-medium-v2", "set obs_dim=11"],
    ),
    "normalization of another obs_dim": (
        *(FINE_TUNE, ["base_policy_path={base}", "normalization_path={tmp}/bounds12.npz"]),
        ["bounds12.npz", "12", "11"],
    ),
    "missing normalization": (
        *(FINE_TUNE, ["base_policy_path={base}", "normalization_path={tmp}/no.npz"]),
        ["no.npz"],
    ),
    "data of another obs_dim": (
        PRE_TRAIN,
        ["train_dataset_path={data}", "obs_dim=12"],
        ["has obs_dim=11", "says obs_dim=12"],
    ),
    "missing data": (PRE_TRAIN, ["train_dataset_path={tmp}/train.npz"], ["no such file", "train.npz", "DPPO_DATA_DIR"]),
    "damaged data": (PRE_TRAIN, ["train_dataset_path={tmp}/cut.npz"], ["cut.npz is damaged"]),
    "missing policy to evaluate": (EVALUATE, ["base_policy_path={tmp}/no.safetensors"], ["no.safetensors"]),
    "policy to evaluate, of other layers": (
        *(EVALUATE, ["base_policy_path={base}", "model.network.mlp_dims=[32,32,32]"]),
        ["base.safetensors", "has shape"],
    ),
    "fine-tuned checkpoint resumed by pre-training": (
        *(PRE_TRAIN, ["train_dataset_path={data}", "resume={run}"]),
        ['kind "dppo"; needed here: diffusion_policy'],
    ),
    "pre-trained checkpoint resumed by fine-tuning": (
        *(FINE_TUNE, ["base_policy_path={base}", "resume={base}"]),
        ['kind "diffusion_policy"; needed here: dppo'],
    ),
    "weights without training state resumed": (
        *(PRE_TRAIN, ["train_dataset_path={data}", "resume={base}"]),
        ["holds weights only and cannot be resumed", "base_policy_path"],
    ),
    "resumed with other layers": (
        *(FINE_TUNE, ["base_policy_path={base}", "resume={run}", "model.critic.mlp_dims=[32,32,32]"]),
        ["state_2.safetensors", "that run has model.critic.mlp_dims=[16, 16, 16] (now [32, 32, 32]), which resuming"],
    ),
    "resumed with longer episodes": (
        *(FINE_TUNE, ["base_policy_path={base}", "resume={run}", "env.max_episode_steps=44"]),
        ["state_2.safetensors", "that run has env.max_episode_steps=40 (now 44)", "which resuming cannot change"],
    ),
    "a warm-up as long as the fine-tuning": (
        *(FINE_TUNE, ["base_policy_path={base}", "train.actor_lr_scheduler.warmup_steps=1000"]),
        ["train.actor_lr_scheduler.warmup_steps=1000 is not smaller", "set train.actor_lr_scheduler.warmup_steps=0"],
    ),
    "a warm-up as long as the pre-training": (
        *(PRE_TRAIN, ["train_dataset_path={data}", "train.lr_scheduler.warmup_steps=999"]),
        ["train.lr_scheduler.warmup_steps=999 is not smaller than", "set train.lr_scheduler.warmup_steps=0"],
    ),
    "resumed from nowhere": (FINE_TUNE, ["base_policy_path={base}", "resume={tmp}/no"], ["no checkpoint there"]),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, base, finished):
    tmp = tmp_path_factory.mktemp("places")
    make_data(tmp / "good.npz")
    bytes_of(tmp / "cut.npz", (tmp / "good.npz").read_bytes()[:2000])
    bytes_of(tmp / "cut.safetensors", base.read_bytes()[:2000])
    bytes_of(tmp / "bad.pt", b"not a pickle at all")
    bounds(tmp / "bounds12.npz", 12)
    base12 = make_base_policy(tmp / "base12.safetensors", "obs_dim=12")
    return {"tmp": tmp, "base": base, "base12": base12, "data": tmp / "good.npz", "run": finished}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit(tmp_path, places, monkeypatch, capsys, case):
    name, overrides, parts = MISFITS[case]
    before = contents(places["run"])
    status = in_this_process(monkeypatch, name, tmp_path / "log" / "run", *(o.format(**places) for o in overrides))
    err = capsys.readouterr().err
    assert status == app.USER_ERROR, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(part in line for part in parts), line
    assert "Traceback" not in err and len([x for x in err.splitlines() if x.startswith("error")]) == 1
    assert not (tmp_path / "log").exists(), "nothing half-written"
    assert contents(places["run"]) == before, "nothing lost"


def test_an_eta_at_its_limit_is_no_divergence(tmp_path, base):
    """Its logit is infinite from the start, as in the reference's image configurations (base_eta = max_eta = 1)."""
    ddim = ["+model.use_ddim=true", "+model.ddim_steps=2", "model.ft_denoising_steps=2"]
    eta = "+model.eta={_target_: diffusion_rl.networks.eta.EtaFixed, base_eta: 1, max_eta: 1}"
    folder = tmp_path / "run"
    run(FINE_TUNE, folder, f"base_policy_path={base}", PLAIN, *ddim, eta, "train.n_train_itr=2")
    tuned = states(folder)[-1]
    assert np.isinf(load_checkpoint(folder / "checkpoint" / tuned).tensors["model.eta.eta_logit"]).all()
    loop(EVALUATE, tmp_path / "eval", f"base_policy_path={folder / 'checkpoint' / tuned}", *ddim[:2]).run()
