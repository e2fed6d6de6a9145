"""Make data for a locomotion task: train SAC up to a given return, roll it out, write the npz files.

Examples: python script/dataset/make_gym_data.py hopper
          python script/dataset/make_gym_data.py hopper --flavour medium-expert
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.core.files import require_writable  # noqa: E402
from diffusion_rl.core.places import data_dir  # noqa: E402
from diffusion_rl.generate.gym_settings import FLAVOURS, MEDIUM_RETURN, Settings  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("task", choices=sorted(MEDIUM_RETURN))
    parser.add_argument("--flavour", choices=FLAVOURS, default="medium")
    parser.add_argument("--work-dir", type=Path, help="actors and training log (default: log/home-made/<task>)")
    parser.add_argument("--out-dir", type=Path, help="default: <data directory>/gym/<task>-<flavour>-v2")
    parser.add_argument("--target-return", type=float, help="default: about D4RL's policy of that flavour")
    parser.add_argument("--actor", type=Path, help="roll this actor out instead of training one")
    parser.add_argument("--replay", type=Path, help="of an earlier training, for medium-replay")
    parser.add_argument("--transitions", type=int, default=100_000)
    for field in dataclasses.fields(Settings):
        kind = {"action": "store_true"} if isinstance(field.default, bool) else {"type": type(field.default)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **kind)
    args = vars(parser.parse_args())
    settings = Settings(**{f.name: args[f.name] for f in dataclasses.fields(Settings)})
    import tensorflow as tf  # after --help, which need not wait for it

    from diffusion_rl.core.threads import silence_compiler
    from diffusion_rl.generate import gym as home_made

    tf.config.threading.set_intra_op_parallelism_threads(1)  # the networks are small: more threads only wait
    tf.config.threading.set_inter_op_parallelism_threads(1)
    silence_compiler()
    out_dir = args["out_dir"] or data_dir() / "gym" / f"{args['task']}-{args['flavour']}-v2"
    work_dir = args["work_dir"] or Path("log/home-made") / args["task"]
    sources = {name: args[name] for name in ("actor", "replay", "target_return")}
    require_writable(out_dir / "train.npz")
    raw = home_made.make(args["task"], args["flavour"], args["transitions"], settings, work_dir, **sources)
    print(json.dumps(home_made.ship(raw, out_dir) | {"directory": str(out_dir)}, indent=1))


if __name__ == "__main__":
    sys.exit(exit_status(main))
