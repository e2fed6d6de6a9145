"""Scores of plans: python scripts/read_results.py [--dataset NAME] [--logbase DIR]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl import planner_commands

if __name__ == "__main__":
    sys.exit(planner_commands.run("planner_commands:read_results"))
