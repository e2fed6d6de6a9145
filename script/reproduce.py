"""List, launch, collect and draw the runs of the papers' figures: python script/reproduce.py FIGURE --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))  # the package of this checkout

from diffusion_rl.cli import commands  # noqa: E402

if __name__ == "__main__":
    sys.exit(commands.run("reproduce:main"))
