"""Plan by many samples without a value: python scripts/plan_unguided.py --dataset NAME [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl.cli import commands

if __name__ == "__main__":
    sys.exit(commands.run("diffuser:plan_unguided"))
