"""Train the value that guides plans: python scripts/train_values.py --dataset NAME [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl.cli import commands

if __name__ == "__main__":
    sys.exit(commands.run("diffuser:train_values"))
