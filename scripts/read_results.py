"""Show scores of plans: python scripts/read_results.py [--dataset NAME] [--logbase DIR]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl.cli import commands

if __name__ == "__main__":
    sys.exit(commands.run("commands:read_results"))
