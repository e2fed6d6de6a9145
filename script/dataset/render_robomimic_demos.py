"""Make the image data set of a robomimic task from the simulator states that lie beside its demonstrations.

Example: python script/dataset/render_robomimic_demos.py can
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.core.places import data_dir, data_folder  # noqa: E402
from diffusion_rl.data.validate import validate  # noqa: E402
from diffusion_rl.generate import robomimic as demos  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(demos.STEPS))
    parser.add_argument("--source", type=Path, help="default: <data directory>/robomimic/<task>")
    parser.add_argument("--out-dir", type=Path, help="default: <data directory>/robomimic/<task>-img")
    parser.add_argument(
        "--episodes", type=int, help="at most so many, from the first on; default: all that have states"
    )
    args = parser.parse_args()
    if args.episodes is not None and args.episodes < 1:
        parser.error("--episodes must be 1 or more")
    source = args.source or data_folder(f"robomimic/{args.task}")
    out_dir = args.out_dir or data_dir() / "robomimic" / f"{args.task}-img"
    report = functools.partial(print, flush=True)
    demos.render(args.task, source, out_dir, report, args.episodes)
    print("\n".join(validate(out_dir)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
