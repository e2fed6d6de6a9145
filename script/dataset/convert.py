"""Convert a file of D4RL, Minari or robomimic, or a folder of Minari or LeRobot, to train.npz and normalization.npz.

Example: python script/dataset/convert.py hopper_medium-v2.hdf5 data/gym/hopper-medium-v2
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.config.schema import require_seed  # noqa: E402
from diffusion_rl.core.noise import NoiseSource  # noqa: E402
from diffusion_rl.data.convert import convert_file  # noqa: E402
from diffusion_rl.data.validate import validate  # noqa: E402
from diffusion_rl.envs.kitchen import goal_of  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--max-episodes", type=int, help="take the first ones only")
    parser.add_argument("--val-split", type=float, default=0.0, help="share of episodes for val.npz (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--keep-unrewarded", action="store_true", help="keep episodes whose return is not positive")
    parser.add_argument("--obs-keys", nargs="*", default=[], help="parts of dictionary observations, in order")
    parser.add_argument("--filter-key", default="", help="of robomimic's files: the list of demonstrations to take")
    parser.add_argument(
        "--kitchen", metavar="TASK", help="Minari's kitchen sets: make D4RL's observations of this task"
    )
    args = parser.parse_args()
    require_seed(args.seed)
    goal = goal_of(args.kitchen) if args.kitchen else None
    converted = convert_file(
        args.source,
        args.out_dir,
        ["observation"] if args.kitchen else args.obs_keys,
        filter_key=args.filter_key,
        kitchen_goal=goal,
        max_episodes=args.max_episodes,
        val_split=args.val_split,
        keep_unrewarded=args.keep_unrewarded,
        rng=NoiseSource(args.seed),
    )
    if converted.skipped:
        print(f"left out {converted.skipped} episodes without positive return (--keep-unrewarded keeps them)")
    for line in validate(args.out_dir):
        print(line)


if __name__ == "__main__":
    sys.exit(exit_status(main))
