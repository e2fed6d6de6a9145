"""Stack blocks: python scripts/plan_kuka.py --task conditional --urdf_dir DIR [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl import planner_commands

if __name__ == "__main__":
    sys.exit(planner_commands.run("kuka_app:plan"))
