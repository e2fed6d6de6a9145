"""`python -m diffusion_rl COMMAND`, the same as `diffusion-rl COMMAND`."""

import sys

from diffusion_rl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
