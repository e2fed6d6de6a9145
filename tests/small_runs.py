"""Whole runs of the loops small enough for tests: overrides, a base policy of random weights, comparisons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from omegaconf import DictConfig, OmegaConf

from diffusion_rl.cli import app
from diffusion_rl.config.compose import REPOSITORY, compose, plain_copy
from diffusion_rl.config.instantiate import find_class, instantiate
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.interop.torch_names import state_dict
from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint
from diffusion_rl.training.continuation import FINE_TUNING_MAY_CHANGE
from diffusion_rl.training.policy_files import policy_facts
from diffusion_rl.training.run_dir import RunDir
from diffusion_rl.training.state_files import StateFiles

FINE_TUNE = "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"
PRE_TRAIN = "gym/pretrain/hopper-medium-v2/pre_diffusion_mlp"
EVALUATE = "gym/eval/hopper-v2/eval_diffusion_mlp"

DIMS = "mlp_dims=[16,16,16]"
SMALL = {
    FINE_TUNE: [
        *("env.n_envs=3", "env.max_episode_steps=40", "++env.threads=1", "denoising_steps=4", "ft_denoising_steps=2"),
        *(f"model.actor.{DIMS}", f"model.critic.{DIMS}", "train.n_steps=6", "train.batch_size=12"),
        *("train.update_epochs=2", "train.val_freq=3", "train.save_model_freq=100", "train.n_train_itr=4"),
        *("train.actor_lr_scheduler.warmup_steps=2", "train.actor_lr_scheduler.min_lr=1e-5", "+tensorboard=false"),
    ],
    PRE_TRAIN: [
        *("denoising_steps=4", f"model.network.{DIMS}", "train.batch_size=32", "train.n_epochs=4"),
        *("train.save_model_freq=100", "+train.train_split=0.9", "+train.val_freq=2", "+train.epoch_start_ema=2"),
        *("+train.update_ema_freq=2", "+tensorboard=false"),
    ],
    EVALUATE: [
        *("env.n_envs=3", "env.max_episode_steps=40", "++env.threads=1", "denoising_steps=4"),
        *(f"model.network.{DIMS}", "n_steps=6"),
    ],
}


@contextmanager
def eagerly() -> Iterator[None]:
    """Run functions operation by operation: small models take less time so than to be compiled."""
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def config(name: str, logdir: Path, *overrides: str) -> DictConfig:
    """The small configuration `name`, prepared as the command line does it."""
    composed = compose(name, [*SMALL[name], *overrides, f"logdir={logdir}"])
    del composed.hydra
    return app.prepare(composed)


def loop(name: str, logdir: Path, *overrides: str) -> Any:
    """The loop of the small configuration, built."""
    cfg = config(name, logdir, *overrides)
    return find_class(cfg._target_)(cfg)


def run(name: str, logdir: Path, *overrides: str) -> Any:
    """The loop, built and run to its end."""
    built = loop(name, logdir, *overrides)
    built.run()
    return built


def arguments(name: str, logdir: Path, *overrides: str) -> list[str]:
    """The command line of the small configuration."""
    folder, _, config_name = name.rpartition("/")
    return [f"--config-dir=cfg/{folder}", f"--config-name={config_name}", *SMALL[name], *overrides, f"logdir={logdir}"]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """`python script/run.py` with these arguments."""
    return subprocess.Popen(
        [sys.executable, "script/run.py", *command],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
        | {"CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def make_base_policy(path: Path, *overrides: str) -> Path:
    """A pre-trained policy's checkpoint, of random weights."""
    cfg = config(PRE_TRAIN, path.parent, *overrides)
    with initial_weights(NoiseSource(5)):
        policy = instantiate(cfg.model)
    weights = state_dict(policy)
    tensors = {f"{kind}.{k}": v for kind in ("model", "ema") for k, v in weights.items()}
    save_checkpoint(path, tensors, {"kind": "diffusion_policy", **policy_facts(policy), "epoch": 1})
    return path


def make_data(path: Path, obs_dim: int = 11, action_dim: int = 3) -> Path:
    """A data set of five episodes of 40 steps."""
    noise, n = NoiseSource(1), 200
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        states=noise.uniform((n, obs_dim), -1, 1),
        actions=noise.uniform((n, action_dim), -1, 1),
        rewards=np.ones(n, np.float32),
        terminals=np.zeros(n, bool),
        traj_lengths=np.full(5, 40),
    )
    return path


def go_through(
    folder: Path,
    steps: Iterable[int],
    keep_every: int,
    resume: str = "never",
    then: Callable[[RunDir], None] = lambda opened: None,
    *overrides: str,
) -> list[list[int]]:
    """A loop that computes nothing over these steps: all of a run that the run folder sees.

    `then` is called after every step. Returns the numbers of the checkpoints that there were after each.
    """
    seen = []
    cfg = config(FINE_TUNE, folder, "base_policy_path=x.pt", f"resume={resume}", *overrides)
    settings = plain_copy(cfg)
    files = StateFiles("dppo", settings, may_change=FINE_TUNING_MAY_CHANGE)
    with RunDir(cfg.logdir, settings, files) as opened:
        opened.begin(-1 if opened.checkpoint is None else opened.checkpoint.metadata["itr"])
        for step in steps:
            opened.metrics.write({"itr": step, "kind": "train"})
            opened.remember(step, {"model.x": np.full(3000, step)}, {"train": {}}, keep=step % keep_every == 0)
            seen.append([int(name.split("_")[1].split(".")[0]) for name in states(folder)])
            then(opened)
    return seen


def rows(logdir: Path) -> list[dict[str, Any]]:
    """The metrics, without what depends on the clock; a torn line fails."""
    lines = (logdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines)
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def states(logdir: Path) -> list[str]:
    """Names of the checkpoints."""
    return sorted(path.name for path in (logdir / "checkpoint").glob("*"))


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Every tensor to the bit, and every fact but the configuration."""
    one, two = load_checkpoint(a), load_checkpoint(b)
    assert list(one.tensors) == list(two.tensors)
    for name, value in one.tensors.items():
        other = two.tensors[name]
        assert value.dtype == other.dtype and value.tobytes() == other.tobytes(), name
    assert {k: v for k, v in one.metadata.items() if k != "config"} == {
        k: v for k, v in two.metadata.items() if k != "config"
    }


def normalized(cfg: DictConfig) -> Any:
    """A configuration as plain values."""
    return OmegaConf.to_container(cfg, resolve=True)
