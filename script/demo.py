"""Fine-tune the shipped Hopper policy and compare before and after: python script/demo.py [key=value ...]."""

import os
import sys

from diffusion_rl.cli import demo
from diffusion_rl.cli.status import exit_status
from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.config.overrides import Arguments

HELP = "script/run.py --help"


def overrides() -> list[str]:
    """What the command line changes in the fine-tuning's configuration."""
    parser = Arguments(description=__doc__)
    parser.add_argument(
        "override", nargs="*", metavar="key=value", help=f"of {demo.FINE_TUNE}, whose keys {HELP} lists"
    )
    return parser.parse_args().override


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(exit_status(lambda: demo.main(overrides())))
