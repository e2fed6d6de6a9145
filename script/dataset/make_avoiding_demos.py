"""Make demonstrations of the avoiding task: a planner steers our simulated robot, or D3IL's recordings are converted.

Example: python script/dataset/make_avoiding_demos.py m1 m2 m3
         python script/dataset/make_avoiding_demos.py m1 --recordings path/to/pickles --out-dir my_data/avoid_m1
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.config.schema import require_range, require_seed  # noqa: E402
from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.core.places import data_dir  # noqa: E402
from diffusion_rl.data.sources.d3il import MODE_SETS, read_folder, select  # noqa: E402
from diffusion_rl.data.validate import validate  # noqa: E402
from diffusion_rl.generate.avoiding import make, save  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "modes", nargs="+", choices=sorted(MODE_SETS), help="m1: gaps 5 and 6, m2: 5 and 7, m3: 5 and 8"
    )
    parser.add_argument("--recordings", type=Path, help="folder of D3IL's pickles to choose from instead of planning")
    parser.add_argument("--per-mode", type=int, default=4, help="planned demonstrations for each gap of the third row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-dir", type=Path, help="default: <data directory>/d3il/avoid_<modes>")
    args = parser.parse_args()
    if args.out_dir and len(args.modes) > 1:
        raise UserError("--out-dir is for one set of modes: give one, or leave it out")
    require_range("--per-mode", args.per_mode, 1, 10_000)
    require_seed(args.seed)
    for name in args.modes:
        chosen = select(read_folder(args.recordings), MODE_SETS[name]) if args.recordings else None
        out_dir = args.out_dir or data_dir() / "d3il" / f"avoid_{name}"
        save(chosen if chosen is not None else make(name, args.per_mode, args.seed), out_dir)
        print(out_dir, *validate(out_dir), sep="\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
