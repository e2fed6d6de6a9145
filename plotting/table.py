"""Show the table of offline scores in LaTeX: python plotting/table.py [--logbase DIR] [--labels FILE]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))

from diffusion_rl.cli import commands  # noqa: E402

if __name__ == "__main__":
    sys.exit(commands.run("commands:table"))
