"""Replay D3IL's recordings of the avoiding task in our simulator and write how far the positions are apart.

Example: python script/dataset/replay_avoiding.py path/to/avoiding/data/pickles
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.data.sources.d3il import read_folder  # noqa: E402
from diffusion_rl.generate.avoiding import replay, write_table  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="D3IL's pickles")
    parser.add_argument("--output", type=Path, default=Path("figure/d3il/replay.csv"))
    args = parser.parse_args()
    print(write_table(replay(read_folder(args.folder)), args.output))


if __name__ == "__main__":
    sys.exit(exit_status(main))
