"""Download what the authors of DPPO, of the planners and of D4RL published; without a name, list what there is.

Examples: python script/download.py halfcheetah-medium-expert-v2
          python script/download.py pretrained.tar --to logs
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

from diffusion_rl.cli.status import exit_status, show  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.data.assets import fetch, fetch_folder, manifest  # noqa: E402
from diffusion_rl.data.locate import d4rl_assets  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="from the list")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="instead of where they are looked for")
    args = parser.parse_args()
    known = manifest() | d4rl_assets()
    if not args.names:
        return show("\n".join(f"{name}: {asset.url}" for name, asset in known.items()))
    for name in args.names:
        if name not in known:
            raise UserError(f"{name} is not in the list, which python script/download.py prints")
        asset = dataclasses.replace(known[name], root=args.to) if args.to else known[name]
        print(fetch_folder(asset) if name.endswith("/") else fetch(asset))


if __name__ == "__main__":
    sys.exit(exit_status(main))
