"""Plan through a maze: python scripts/plan_maze2d.py --config config.maze2d --dataset NAME [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl import planner_commands

if __name__ == "__main__":
    sys.exit(planner_commands.run("planner_app:plan_maze2d"))
