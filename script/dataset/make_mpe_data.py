"""Data for simple_spread: python script/dataset/make_mpe_data.py [--quality medium|expert] [--episodes 1000]."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "code"))  # a checkout that is not installed

from diffusion_rl import planner_commands  # noqa: E402
from diffusion_rl.loops import mpe_data  # noqa: E402

if __name__ == "__main__":
    sys.exit(planner_commands.run(mpe_data.main))
