"""Fine-tune the shipped Hopper policy and compare before and after: python script/demo.py [key=value ...]."""

import os
import sys

from diffusion_rl import demo
from diffusion_rl.configs import REPOSITORY
from diffusion_rl.core.errors import exit_status

if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(exit_status(lambda: demo.main(sys.argv[1:])))
