"""Start every run of an experiment's grid: python run_experiment.py -e exp_specs/NAME.yaml [-g GPU] [--resume]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "code"))  # the package of this checkout

from diffusion_rl.cli import commands  # noqa: E402

if __name__ == "__main__":
    sys.exit(commands.run("experiments:main"))
