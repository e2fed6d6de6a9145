"""Train VAE + Diffusion RL, one experiment: python train.py -e FILE.yaml [-g GPU]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "code"))  # the package of this checkout

from diffusion_rl.cli import commands  # noqa: E402

if __name__ == "__main__":
    sys.exit(commands.run("vae:train"))
