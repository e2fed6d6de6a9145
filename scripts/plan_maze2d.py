"""Plan through a maze: python scripts/plan_maze2d.py --config config.maze2d --dataset NAME [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl.cli import commands

if __name__ == "__main__":
    sys.exit(commands.run("diffuser:plan_maze2d"))
