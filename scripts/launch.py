"""Jobs elsewhere: python scripts/launch.py docker|singularity|slurm|azure [--job train] [--dry_run True]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl.cli import commands

if __name__ == "__main__":
    sys.exit(commands.run("launchers:main"))
