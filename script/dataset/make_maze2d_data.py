"""Make data of a controller that follows waypoints through a maze, in the layout of D4RL's files.

python script/dataset/make_maze2d_data.py maze2d-umaze-v1 [--steps N] [--seed S] [--output FILE]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.config.schema import require_range, require_seed  # noqa: E402
from diffusion_rl.core.files import require_writable  # noqa: E402
from diffusion_rl.core.noise import NoiseSource  # noqa: E402
from diffusion_rl.core.places import data_dir  # noqa: E402
from diffusion_rl.data.hdf5 import write_hdf5  # noqa: E402
from diffusion_rl.envs.maze2d import Maze2D  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: maze2d/<name>.hdf5 in the data directory")
    options = parser.parse_args()
    require_range("--steps", options.steps, 1)
    require_seed(options.seed)
    maze, path = Maze2D(options.name), options.output or data_dir() / "maze2d" / f"{options.name}.hdf5"
    require_writable(path)
    from diffusion_rl.methods.diffuser.maze2d import waypoint_data  # TensorFlow with it

    arrays = waypoint_data(maze, options.steps, NoiseSource(options.seed))
    write_hdf5(path, arrays)
    print(f"{path}: {options.steps} steps, {arrays['rewards'].mean():.3f} of them at the goal")


if __name__ == "__main__":
    sys.exit(exit_status(main))
