"""Data of a controller that follows waypoints through a maze, in the layout of D4RL's files.

python script/dataset/make_maze2d_data.py maze2d-umaze-v1 [--steps N] [--seed S] [--output FILE]
"""

import argparse
import sys
from pathlib import Path

import h5py

sys.path.append(str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.core.errors import exit_status  # noqa: E402
from diffusion_rl.core.noise import NoiseSource  # noqa: E402
from diffusion_rl.data.assets import data_dir  # noqa: E402
from diffusion_rl.envs.maze2d import Maze2D  # noqa: E402
from diffusion_rl.loops.maze2d import waypoint_data  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: maze2d/<name>.hdf5 in the data directory")
    options = parser.parse_args()
    arrays = waypoint_data(Maze2D(options.name), options.steps, NoiseSource(options.seed))
    path = options.output or data_dir() / "maze2d" / f"{options.name}.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    with h5py.File(partial, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip")
    partial.replace(path)
    print(f"{path}: {options.steps} steps, {arrays['rewards'].mean():.3f} of them at the goal")


if __name__ == "__main__":
    sys.exit(exit_status(main))
