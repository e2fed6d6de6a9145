"""Go on with a training: python scripts/resume_training.py --dataset NAME [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl.cli import commands

if __name__ == "__main__":
    sys.exit(commands.run("diffuser:continue_training"))
