"""Make data for simple_spread: python script/dataset/make_mpe_data.py [--quality medium|expert] [--episodes 1000]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))  # the package of this checkout

from diffusion_rl.cli import commands  # noqa: E402
from diffusion_rl.generate import agents  # noqa: E402

if __name__ == "__main__":
    sys.exit(commands.run(agents.main))
