"""Small trainings in float64 with several processes.

`python -m tests.replica_program pretrain|finetune N FOLDER DATA [key=value …]`
"""

import sys
from pathlib import Path

import tf_keras
from tests.small_runs import FINE_TUNE, PRE_TRAIN, config

from diffusion_rl.cli import app
from diffusion_rl.methods.on_policy.training import OnPolicyTraining
from diffusion_rl.methods.pretraining.training import PreTraining


def in_float64(kind, settings):
    """What a replica of a training holds, in float64."""
    tf_keras.backend.set_floatx("float64")
    return kind(settings)


def fine_tuning(settings):
    return in_float64(_replica[OnPolicyTraining], settings)


def pre_training(settings):
    return in_float64(_replica[PreTraining], settings)


_replica = {loop: loop.replica for loop in (OnPolicyTraining, PreTraining)}


def main(what, n, folder, data, *more):
    tf_keras.backend.set_floatx("float64")
    OnPolicyTraining.replica, PreTraining.replica = staticmethod(fine_tuning), staticmethod(pre_training)
    name = FINE_TUNE if what == "finetune" else PRE_TRAIN
    options = [f"base_policy_path={data}"] if what == "finetune" else [f"train_dataset_path={data}"]
    app.run_prepared(config(name, Path(folder), *options, f"+train.replicas={n}", *more))


if __name__ == "__main__":
    main(*sys.argv[1:])
