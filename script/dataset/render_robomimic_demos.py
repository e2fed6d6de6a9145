"""Make the image data set of a robomimic task from the simulator states that lie beside its demonstrations.

Example: python script/dataset/render_robomimic_demos.py can
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.data.assets import data_dir  # noqa: E402
from diffusion_rl.data.validate import validate  # noqa: E402
from diffusion_rl.generate import robomimic as demos  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(demos.STEPS))
    parser.add_argument("--source", type=Path, help="default: <data directory>/robomimic/<task>")
    parser.add_argument("--out-dir", type=Path, help="default: <data directory>/robomimic/<task>-img")
    args = parser.parse_args()
    folder = data_dir() / "robomimic"
    out_dir = args.out_dir or folder / f"{args.task}-img"
    demos.render(args.task, args.source or folder / args.task, out_dir, lambda line: print(line, flush=True))
    print("\n".join(validate(out_dir)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
