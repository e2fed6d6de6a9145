"""DiffuserLite on D4RL's Franka Kitchen: `task=NAME mode=MODE [key=value ...]`."""

import sys

import _checkout  # noqa: F401

from diffusion_rl import planner_commands

if __name__ == "__main__":
    sys.exit(planner_commands.run("lite_app:kitchen"))
