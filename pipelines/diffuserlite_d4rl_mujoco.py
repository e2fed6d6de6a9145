"""DiffuserLite on D4RL's locomotion tasks: `task=NAME mode=MODE [key=value ...]`."""

import sys

import _checkout  # noqa: F401

from diffusion_rl.cli import commands

if __name__ == "__main__":
    sys.exit(commands.run("diffuser_lite:mujoco"))
