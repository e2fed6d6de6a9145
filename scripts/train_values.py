"""Train the value that guides plans: python scripts/train_values.py --dataset NAME [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl import planner_commands

if __name__ == "__main__":
    sys.exit(planner_commands.run("planner_app:train_values"))
