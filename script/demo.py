"""Fine-tune the shipped Hopper policy and compare before and after: python script/demo.py [key=value ...]."""

import os
import sys

from diffusion_rl.cli import demo
from diffusion_rl.cli.status import exit_status
from diffusion_rl.config.compose import REPOSITORY

if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(exit_status(lambda: demo.main(sys.argv[1:])))
