"""Stack blocks: python scripts/plan_kuka.py --task conditional --urdf_dir DIR [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl.cli import commands

if __name__ == "__main__":
    sys.exit(commands.run("kuka:plan"))
