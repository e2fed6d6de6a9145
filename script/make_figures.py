"""Draw figures from run folders and policies: python script/make_figures.py --help lists them."""

import sys

from diffusion_rl.cli.exploration import add_command
from diffusion_rl.cli.figures import main

if __name__ == "__main__":
    sys.exit(main([add_command]))
