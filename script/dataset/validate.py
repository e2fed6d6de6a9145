"""Say what is in a data set's folder (train.npz, val.npz, normalization.npz) and whether it can be trained on.

Example: python script/dataset/validate.py data/gym/hopper-medium-v2
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.data.validate import validate  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    try:
        for line in validate(parser.parse_args().directory):
            print(line)
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
