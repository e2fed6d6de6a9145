"""Convert robomimic's demonstrations (HDF5, of states or of images) to train.npz, val.npz and normalization.npz.

Example: python script/dataset/process_robomimic_dataset.py --load_path low_dim_v141.hdf5 --save_dir data/robomimic/can
With images: … --load_path image_v141.hdf5 --save_dir data/robomimic/can-img --cameras robot0_eye_in_hand
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


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_path", type=Path, required=True, help="robomimic's HDF5 file")
    parser.add_argument("--save_dir", type=Path, required=True)
    parser.add_argument("--val_split", type=float, default=0.0, help="share of episodes for val.npz (default: none)")
    parser.add_argument("--max_episodes", type=int, default=-1, help="take the first ones only (default: all)")
    parser.add_argument("--cameras", nargs="*", default=[], help="take their images, and leave out the object's state")
    parser.add_argument(
        "--obs_keys", nargs="*", default=[], help="entries of the state, in order (default: the reference's)"
    )
    parser.add_argument("--filter_key", default="", help="the file's list of demonstrations to take (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--normalize", action="store_true", help="always done; accepted for the reference's command")
    args = parser.parse_args()
    require_seed(args.seed)
    convert_file(
        args.load_path,
        args.save_dir,
        args.obs_keys,
        filter_key=args.filter_key,
        cameras=args.cameras,
        max_episodes=None if args.max_episodes == -1 else args.max_episodes,
        val_split=args.val_split,
        keep_unrewarded=True,
        rng=NoiseSource(args.seed),
    )
    for line in validate(args.save_dir):
        print(line)


if __name__ == "__main__":
    sys.exit(exit_status(main))
