"""Every training of the package, as small as it gets, behind one call: what tests/test_engine.py goes through.

`python -m tests.engine_programs NAME DATA FOLDER` runs one in a process of its own, to be killed.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import tensorflow as tf
from tests import test_flow, test_off_policy
from tests.small_runs import FINE_TUNE, PRE_TRAIN, make_base_policy, make_data, run
from tests.test_vae_diffusion import SMALL as VAE

from diffusion_rl.cli import diffuser, diffuser_lite, vae
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.methods.diffuser_lite.domains import DOMAINS

TASK = "hopper-medium-v2"
DIFFUSER = [
    *("--dataset", TASK, "--horizon", "4", "--n_diffusion_steps", "3", "--seed", "0", "--dim_mults", "(1,)"),
    *("--n_saves", "2", "--save_freq", "2", "--batch_size", "4", "--sample_freq", "0", "--n_train_steps", "6"),
    *("--n_steps_per_epoch", "3"),
]
LITE = [
    *(f"task={TASK}", "emb_dim=16", "d_model=16", "n_heads=2", "depth=1", "batch_size=16", "log_interval=1"),
    *("diffusion_gradient_steps=6", "invdyn_gradient_steps=4", "reflow_gradient_steps=6", "save_interval=2"),
    *("cond_dataset_size=13", "uncond_dataset_size=5", "dataset_prepare_batch_size=10"),
    "dataset_prepare_sampling_steps=2",
]
PLAIN = "+train.fast=false"  # compiles faster
RLPD = "gym/scratch/halfcheetah-v2/rlpd_mlp"
DSRL, FQL = "gym/finetune/hopper-v2/ft_dsrl_reflow_mlp", "gym/pretrain/halfcheetah-medium-v2/fql_mlp_offline"
FLOWS = ("ReinFlow", "DSRL", "FQL")  # of whose engine nothing is their own
VAE_QUICK = {
    **{"n_train_steps": 6, "rl_warmup_steps": 2, "rl_collect_freq": 2, "rl_collect_steps": 3, "log_freq": 2},
    **{"save_freq": 2, "step_start_ema": 2, "vae_pretrain_steps": 1},
}
PIPELINE = Path("diffuserlite_d4rl_mujoco") / TASK


@dataclass(frozen=True)
class Program:
    """A training: `run(data, folder, options)` trains in a folder; `run_dir` and `last` are below it."""

    run: Callable[[Path, Path, list[str]], None]
    run_dir: str
    last: str  # the state at the end
    stop_at: str  # the option, in the program's spelling
    resume: str
    go_on: str  # what the last line of an interrupted run says
    begin: Callable[[Path, Path], None] = lambda data, folder: None

    def train(self, data: Path, folder: Path, go_on: bool = False, stop_at: int | None = None) -> None:
        """Train to the end, or to `stop_at`."""
        options = self.resume.split() if go_on else []
        self.run(data, folder, options + ([] if stop_at is None else f"{self.stop_at}{stop_at}".split()))


def _fine_tune(data: Path, folder: Path, options: list[str]) -> None:
    more = [PLAIN, "train.save_model_freq=1", "train.n_train_itr=4", f"base_policy_path={data / 'base.safetensors'}"]
    run(FINE_TUNE, folder / "run", *more, *options)


def _off_policy(data: Path, folder: Path, options: list[str]) -> None:
    given = [*test_off_policy.RUNS[RLPD], "train.n_train_itr=6", "train.n_explore_steps=1"]
    test_off_policy.run(RLPD, folder / "run", *given, f"offline_dataset_path={data / 'cheetah.npz'}", *options)


def _reinflow(data: Path, folder: Path, options: list[str]) -> None:
    run(test_flow.TUNE["reflow"], folder / "run", PLAIN, f"base_policy_path={data / 'flow.safetensors'}", *options)


def _dsrl(data: Path, folder: Path, options: list[str]) -> None:
    given = [*test_off_policy.RUNS[DSRL], "train.n_train_itr=6", "train.n_explore_steps=1"]
    test_off_policy.run(DSRL, folder / "run", *given, f"base_policy_path={data / 'flow.safetensors'}", *options)


def _fql(data: Path, folder: Path, options: list[str]) -> None:
    given = [*test_off_policy.RUNS[FQL], f"offline_dataset_path={data / 'cheetah.npz'}"]
    test_off_policy.run(FQL, folder / "run", *given, *options)


def _pre_train(data: Path, folder: Path, options: list[str]) -> None:
    run(PRE_TRAIN, folder / "run", "train.save_model_freq=1", f"train_dataset_path={data / 'train.npz'}", *options)


def _diffuser(data: Path, folder: Path, options: list[str]) -> None:
    diffuser.train([*DIFFUSER, "--logbase", str(folder), *options])


def _values(data: Path, folder: Path, options: list[str]) -> None:
    diffuser.train_values([*DIFFUSER, "--logbase", str(folder), *options])


def _lite(mode: str) -> Callable[[Path, Path, list[str]], None]:
    return lambda data, folder, options: diffuser_lite.mujoco(
        [*LITE, f"mode={mode}", f"results_dir={folder}", *options]
    )


def _vae(data: Path, folder: Path, options: list[str]) -> None:
    changes = {**VAE, **VAE_QUICK, "online_training": True, "backbone": "mlp", "fast": False, "eval_freq": 0, "seed": 0}
    given = dict(option.split("=") for option in options)
    changes |= {"stop_at": int(given["stop_at"])} if "stop_at" in given else {}
    changes |= {"continue_training": True} if "continue_training" in given else {}
    training = vae.training_of(vae.settings({**changes, "logbase": str(folder), "exp_name": "e", "job_name": "j"}))
    training.run()


HYDRA = ("++train.stop_at=", "resume=auto", "resume={run_dir}")
FLAGS = ("--stop_at ", "--resume True", "--resume True")
KEYS = ("stop_at=", "", "resume=auto")
PROGRAMS = {
    "DPPO": Program(_fine_tune, "run", "checkpoint/state_3.safetensors", *HYDRA),
    "RLPD": Program(_off_policy, "run", "checkpoint/state_5.safetensors", *HYDRA),
    "ReinFlow": Program(_reinflow, "run", "checkpoint/state_3.safetensors", *HYDRA),
    "DSRL": Program(_dsrl, "run", "checkpoint/state_5.safetensors", *HYDRA),
    "FQL": Program(_fql, "run", "checkpoint/state_3.safetensors", *HYDRA),
    "pre-training": Program(_pre_train, "run", "checkpoint/state_4.safetensors", *HYDRA),
    "Diffuser": Program(_diffuser, f"{TASK}/diffusion/defaults_H4_T3", "state_6.safetensors", *FLAGS),
    "values": Program(_values, f"{TASK}/values/defaults_H4_T3_d0.99", "state_6.safetensors", *FLAGS),
    "DiffuserLite": Program(_lite("training"), str(PIPELINE), "train_state_training.safetensors", *KEYS),
    "reflow": Program(
        *(_lite("reflow"), str(PIPELINE / "reflow"), "../train_state_reflow.safetensors", *KEYS),
        lambda data, folder: shutil.copytree(data / "results", folder, dirs_exist_ok=True) and None,
    ),
    "VAE": Program(
        *(_vae, "e/j/0", "checkpoint/state_6.safetensors", "stop_at=", "continue_training=True"),
        "continue_training: true",
    ),
}


def surroundings(data: Path) -> None:
    """What all of them need of this process: where data are, small levels, nothing compiled."""
    os.environ["D4RL_DATASET_DIR"] = str(data)
    DOMAINS["mujoco"] = replace(DOMAINS["mujoco"], horizons=(3, 3))
    tf.config.run_functions_eagerly(True)


def prepare(data: Path) -> None:
    """Data, a pre-trained policy, and what a reflow begins from."""
    make_data(data / "train.npz")
    make_data(data / "cheetah.npz", 17, 6)
    make_base_policy(data / "base.safetensors")
    test_off_policy.make_flow(data / "flow.safetensors")
    draw, n = NoiseSource(0), 60
    with h5py.File(data / "hopper_medium-v2.hdf5", "w") as file:
        file["observations"], file["actions"] = draw.normal((n, 11)), draw.uniform((n, 3), -1, 1)
        file["rewards"], file["terminals"] = draw.normal((n,)), np.arange(n) == 19
        file["timeouts"] = np.isin(np.arange(n), (39, 59))
    for mode in ("training", "prepare_dataset"):
        _lite(mode)(data, data / "results", [])


if __name__ == "__main__":
    surroundings(Path(sys.argv[2]))
    PROGRAMS[sys.argv[1]].train(Path(sys.argv[2]), Path(sys.argv[3]), go_on="--again" in sys.argv)
