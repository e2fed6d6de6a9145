"""Go on with a training: python scripts/resume_training.py --dataset NAME [--option VALUE ...]."""

import sys

import _checkout  # noqa: F401

from diffusion_rl import planner_commands

if __name__ == "__main__":
    sys.exit(planner_commands.run("planner_app:resume_training"))
