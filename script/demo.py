"""Fine-tune the shipped Hopper policy and compare before and after: python script/demo.py [key=value ...]."""

import argparse
import sys

from diffusion_rl.cli import demo
from diffusion_rl.cli.status import exit_status
from diffusion_rl.config.overrides import Arguments

HELP = "python script/run.py --help"


def arguments() -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    parser.add_argument(
        "override", nargs="*", metavar="key=value", help=f"of {demo.FINE_TUNE}, whose keys {HELP} lists"
    )
    parser.add_argument("--quick", action="store_true", help="episodes cut short: shows that all parts work, no more")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    return demo.main(given.override, quick=given.quick)


if __name__ == "__main__":
    sys.exit(exit_status(main))
