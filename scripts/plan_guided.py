"""Plan with guidance by a value: python scripts/plan_guided.py --dataset NAME [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl import planner_commands

if __name__ == "__main__":
    sys.exit(planner_commands.run("planner_app:plan_guided"))
