"""Make demonstrations of a robomimic task with its scripted expert, and write the npz files.

Example: python script/dataset/make_robomimic_demos.py can --attempts 100 --noise 0.2
How often the expert succeeds: python script/dataset/make_robomimic_demos.py can --attempts 50 --measure
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.core.files import require_writable  # noqa: E402
from diffusion_rl.core.places import data_dir  # noqa: E402
from diffusion_rl.data.validate import validate  # noqa: E402
from diffusion_rl.generate import robomimic as demos  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(demos.STEPS))
    parser.add_argument("--attempts", type=int, default=100, help="episodes, of which the successful ones are kept")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of what is added to the motions")
    parser.add_argument("--speed", type=float, default=1.0, help="largest share of an action that the expert uses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-dir", type=Path, help="default: <data directory>/robomimic/<task>")
    parser.add_argument("--measure", action="store_true", help="say how often it succeeds, write nothing")
    parser.add_argument(
        "--shown", type=int, help="keep simulator states, for pictures, of so many only; default: of all"
    )
    args = vars(parser.parse_args())
    settings = demos.Settings(**{field.name: args[field.name] for field in dataclasses.fields(demos.Settings)})
    out_dir = args["out_dir"] or data_dir() / "robomimic" / args["task"]
    if not args["measure"]:
        require_writable(out_dir / "train.npz")
    kept = list(demos.collect(args["task"], settings, lambda line: print(line, flush=True)))
    if not args["measure"]:
        demos.save(out_dir, kept, settings, args["shown"])
        print("\n".join(validate(out_dir)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
