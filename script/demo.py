"""Fine-tune the shipped Hopper policy and compare before and after: python script/demo.py [key=value ...]."""

import os
import sys

from diffusion_rl import demo
from diffusion_rl.configs import REPOSITORY
from diffusion_rl.core.errors import UserError

if __name__ == "__main__":
    os.chdir(REPOSITORY)
    try:
        sys.exit(demo.main(sys.argv[1:]))
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
