"""Shows demonstrations of the avoiding task in a window: python script/test_d3il_render.py [avoid_m1]."""

import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "code"))  # the package of this checkout

from diffusion_rl.cli import commands  # noqa: E402


def main(arguments: list[str]) -> None:
    """Repeats the actions of every demonstration of a data set, as fast as the arm moved."""
    import numpy as np

    from diffusion_rl.data.episodes import load_episodes
    from diffusion_rl.data.normalizers import MinMaxNormalizer
    from diffusion_rl.envs.d3il_avoiding import ACTION_DIM, FPS, OBS_DIM, AvoidingVectorEnv

    folder = REPOSITORY / "data" / "d3il" / (arguments[0] if arguments else "avoid_m1")
    episodes = load_episodes(folder / "train.npz", scaled=True)
    bounds = MinMaxNormalizer.from_npz(folder / "normalization.npz", OBS_DIM, ACTION_DIM)
    env = AvoidingVectorEnv("avoiding-m5", 1, max_episode_steps=None, normalizer=bounds, render=True)
    for actions in np.split(episodes.actions, episodes.starts[1:]):
        env.reset()
        for action in actions:
            env.step(action[None, None])
            time.sleep(1 / FPS)
    env.close()


if __name__ == "__main__":
    sys.exit(commands.run(main))
