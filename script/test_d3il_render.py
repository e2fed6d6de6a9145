"""Show the avoiding task: the arm follows the first demonstration of m1, in a window or in a video.

Examples: python script/test_d3il_render.py
          python script/test_d3il_render.py --video avoiding.mp4
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.core.places import data_folder  # noqa: E402
from diffusion_rl.data.episodes import load_unscaled  # noqa: E402
from diffusion_rl.envs.make import make_vector_env  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="write this file, without a display (MUJOCO_GL)")
    args = parser.parse_args()
    demonstrations = load_unscaled(data_folder("d3il/avoid_m1"))
    task = {"name": "avoiding-m5", "n_envs": 1, "max_episode_steps": 100, "render": args.video is None}
    venv = make_vector_env(task, obs_dim=4, action_dim=2, act_steps=1, seed=0)
    venv.reset([{"video_path": str(args.video)}] if args.video else None)
    for action in demonstrations.actions[: demonstrations.traj_lengths[0]]:
        print(f"reward: {venv.step(action[None, None]).rewards[0]:.1f}")
    venv.close()
    print(f"wrote {args.video}" if args.video else "the window is closed")


if __name__ == "__main__":
    sys.exit(exit_status(main))
