"""Train a model of the Kuka stacking data: python scripts/train_kuka.py --data_dir DIR [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl.cli import commands

if __name__ == "__main__":
    sys.exit(commands.run("kuka:train"))
