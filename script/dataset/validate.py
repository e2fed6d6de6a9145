"""Say what is in a data set's folder (train.npz, val.npz, normalization.npz) and whether it can be trained on.

Example: python script/dataset/validate.py data/gym/hopper-medium-v2
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.data.validate import validate  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for line in validate(parser.parse_args().directory):
        print(line)
    print("ok")


if __name__ == "__main__":
    sys.exit(exit_status(main))
