"""Train what guides the Kuka's plans: python scripts/train_kuka_classifier.py --data_dir DIR [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl.cli import commands

if __name__ == "__main__":
    sys.exit(commands.run("kuka:train_classifier"))
