"""Make medium-level data for a locomotion task: train SAC up to a given return, roll it out, write the npz files.

Example: python script/dataset/make_gym_data.py hopper
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

import tensorflow as tf  # noqa: E402

from diffusion_rl.core.errors import exit_status  # noqa: E402
from diffusion_rl.core.threads import silence_compiler  # noqa: E402
from diffusion_rl.data.assets import data_dir  # noqa: E402
from diffusion_rl.loops import home_made_data as home_made  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("task", choices=sorted(home_made.MEDIUM_RETURN))
    parser.add_argument("--work-dir", type=Path, help="actors and training log (default: log/home-made/<task>)")
    parser.add_argument("--out-dir", type=Path, help="default: <data directory>/gym/<task>-medium-v2")
    parser.add_argument("--target-return", type=float, help="default: about D4RL's medium policy")
    parser.add_argument("--actor", type=Path, help="roll this actor out instead of training one")
    parser.add_argument("--transitions", type=int, default=100_000)
    for field in dataclasses.fields(home_made.Settings):
        kind = {"action": "store_true"} if isinstance(field.default, bool) else {"type": type(field.default)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **kind)
    args = vars(parser.parse_args())
    settings = home_made.Settings(**{f.name: args[f.name] for f in dataclasses.fields(home_made.Settings)})
    tf.config.threading.set_intra_op_parallelism_threads(1)  # the networks are small: more threads only wait
    tf.config.threading.set_inter_op_parallelism_threads(1)
    silence_compiler()
    task = args["task"]
    out_dir = args["out_dir"] or data_dir() / "gym" / f"{task}-medium-v2"
    target = home_made.MEDIUM_RETURN[task] if args["target_return"] is None else args["target_return"]
    work_dir = args["work_dir"] or Path("log/home-made") / task
    actor = args["actor"] or home_made.train(task, target, settings, work_dir)
    print(f"rolling out {actor}", flush=True)
    found = home_made.make_data(task, actor, args["transitions"], settings, out_dir)
    print(json.dumps(found | {"directory": str(out_dir)}, indent=1))


if __name__ == "__main__":
    sys.exit(exit_status(main))
