"""Our side: adapters from the rows of the table to this repository's own objects. Run by benchmarks/run.py."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402
import workloads as w  # noqa: E402
from worker import Workload, serve  # noqa: E402

HALVES = ["++train.precision=bfloat16"] if "--bfloat16" in sys.argv else []


def config(name: str, *overrides: str) -> Any:
    """A shipped configuration in the precision that is asked for, resolved, writing nowhere near the user's runs."""
    from omegaconf import OmegaConf

    from diffusion_rl.cli.app import prepare
    from diffusion_rl.config.compose import compose

    cfg = compose(name, [*HALVES, *overrides, f"logdir={tempfile.gettempdir()}/unused"])
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra", None)
    return prepare(cfg)


@functools.cache
def fine_tuning(*overrides: str) -> tuple[Any, Any]:
    """(configuration, trainer) of the default Hopper run, with random weights; overrides: of the configuration."""
    from diffusion_rl.config.instantiate import instantiate
    from diffusion_rl.methods.on_policy.dppo import DPPOTrainer

    cfg = config(f"{w.CONFIG_FOLDER}/{w.CONFIG_NAME}", "model.network_path=null", *overrides)
    return cfg, DPPOTrainer(instantiate(cfg["model"]), cfg["train"], reward_horizon=cfg["act_steps"])


@functools.cache
def noise() -> Any:
    from diffusion_rl.core.noise import NoiseSource

    return NoiseSource(0)


def sampling(envs: int = w.ENVS, overrides: Sequence[str] = ()) -> Workload:
    cfg, trainer = fine_tuning(*overrides)
    state = w.rollout(samples=envs, history=cfg["cond_steps"]).state

    def call() -> None:
        draws = noise().normal(trainer.actor.noise_shape(envs))
        trainer.actor.act(state, draws, deterministic=False)

    return call


def values() -> Workload:
    _, trainer = fine_tuning()
    state = w.rollout().state
    return lambda: trainer.values(state)


def log_probs() -> Workload:
    _, trainer = fine_tuning()
    r = w.rollout()

    def call() -> None:
        trainer.values(r.state)
        trainer.actor.log_probs(r.state, r.chains)

    return call


def minibatch(rows: int = w.MINIBATCH, samples: int = w.SAMPLES, overrides: Sequence[str] = ()) -> Workload:
    cfg, trainer = fine_tuning(*overrides)
    sizes = (cfg["ft_denoising_steps"], cfg["horizon_steps"], cfg["cond_steps"])
    r = w.rollout(0, samples, *sizes)
    old = trainer.actor.log_probs(r.state, r.chains)
    n_rows = trainer.load(r.state, r.chains, r.returns, r.values, r.advantages, old)
    epoch = {"number": 0, "rows": np.empty(0, np.int64)}

    def call() -> None:
        number = epoch["number"] % (n_rows // rows)
        if number == 0:
            epoch["rows"] = noise().permutation(n_rows)
        trainer.minibatch(epoch["rows"][number * rows :][:rows], True, number)
        epoch["number"] += 1

    return call


def pretraining(*overrides: str) -> Workload:
    from diffusion_rl.methods.pretraining.training import PreTraining

    loop = PreTraining(config("gym/pretrain/hopper-medium-v2/pre_diffusion_mlp", *overrides))
    loop.step = 19  # epoch 20, from where on the average is one
    epoch = {"items": np.empty(0, np.int64)}

    def call() -> None:
        count = w.PRETRAIN_STEPS * w.PRETRAIN_BATCH
        if len(epoch["items"]) < count:
            epoch["items"] = loop.items[loop.rng.permutation(len(loop.items))]
        now, epoch["items"] = epoch["items"][:count], epoch["items"][count:]
        items = now.reshape(w.PRETRAIN_STEPS, w.PRETRAIN_BATCH)
        t, draws = loop._draw(items.shape, loop.rng)
        loop.trainer.steps(items, t, draws, loop._averaging(len(items)))

    return call


def environments(envs: int = w.ENVS) -> Workload:
    from diffusion_rl.envs.make import make_vector_env

    cfg, _ = fine_tuning()
    venv = make_vector_env(
        cfg["env"], obs_dim=w.OBSERVATION, action_dim=w.ACTION, act_steps=w.HORIZON, seed=0, n_envs=envs
    )
    venv.reset()
    chunks, turn = w.actions(envs=envs), {"i": 0}

    def call() -> None:
        venv.step(chunks[turn["i"] % len(chunks)])
        turn["i"] += 1

    return call


def multiply(m: int, k: int, n: int) -> Workload:
    import tensorflow as tf

    g = np.random.default_rng(0)
    a, b = (tf.constant(g.standard_normal(shape), tf.float32) for shape in ((m, k), (k, n)))
    return lambda: tf.matmul(a, b).numpy()[0, 0]


def write_policy(path: Path, name: str) -> None:
    """The pre-trained policy of a fine-tuning configuration, or a random one, as a file that both sides read.

    Args:
        name: of the configuration, below that of the tasks' folder.
    """
    from diffusion_rl.config.instantiate import instantiate
    from diffusion_rl.core.noise import initial_weights
    from diffusion_rl.interop.torch_names import state_dict
    from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint

    source = Path(config(f"{w.CONFIG_FOLDER}/{name}")["base_policy_path"])
    if source.exists():
        checkpoint = load_checkpoint(source)
        return save_checkpoint(path, checkpoint.tensors, checkpoint.metadata)
    with initial_weights(noise()):
        model = instantiate(config("gym/pretrain/hopper-medium-v2/pre_diffusion_mlp")["model"])
    weights = state_dict(model)
    tensors = {f"{kind}.{name}": value for kind in ("model", "ema") for name, value in weights.items()}
    save_checkpoint(path, tensors, {"kind": "diffusion_policy", "epoch": 1})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write-policy"]:
        write_policy(Path(sys.argv[2]), sys.argv[3])
    elif sys.argv[1:2] == ["--write-algorithms"]:
        import algorithms
        import our_algorithms

        described = {name: our_algorithms.described(config, name) for name in algorithms.CASES}
        Path(sys.argv[2]).write_text(json.dumps(described))
    elif sys.argv[1:2] == ["--default-threads"]:  # TensorFlow as it comes, for its own rate of matrix products
        serve({}, multiply)
    else:
        import our_algorithms
        import our_networks

        from diffusion_rl.core.threads import configure_threads

        configure_threads(shared="--shared-operations" in sys.argv)  # as off-policy training has it
        makers = {f.__name__: f for f in (sampling, values, log_probs, minibatch, pretraining, environments)}
        serve(
            makers | our_networks.makers() | our_algorithms.makers(config), multiply, packages=["tensorflow", "mujoco"]
        )
