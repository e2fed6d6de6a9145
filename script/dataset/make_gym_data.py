"""Make home-made medium-level data for a locomotion task: train SAC, roll it out, write train.npz and normalization.npz."""

import argparse
import json
import sys
from pathlib import Path

import tensorflow as tf

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from diffusion_rl.loops import home_made_data as hm  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(hm.TASKS))
    parser.add_argument("--work-dir", type=Path, required=True, help="actors and training log")
    parser.add_argument("--bodies", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-envs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--replay-ratio", type=float, default=0.5, help="gradient steps per environment step")
    parser.add_argument("--scan", type=int, default=50, help="gradient steps per compiled call")
    parser.add_argument("--explore-steps", type=int, default=10_000)
    parser.add_argument("--buffer-size", type=int, default=1_000_000)
    parser.add_argument("--max-updates", type=int, default=500_000)
    parser.add_argument("--eval-every", type=int, default=2500)
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    task = hm.TASKS[args.task]
    bodies = json.loads(args.bodies.read_text())[task.env_id] if args.bodies else None
    envs = hm.Environments(task.env_id, args.n_envs, args.seed, bodies)
    eval_envs = hm.Environments(task.env_id, 16, args.seed + 10_000, bodies)
    obs_dim, action_dim = envs.reset().shape[1], envs.envs[0].action_space.shape[0]
    agent = hm.build_agent(obs_dim, action_dim, args.seed)
    print(hm.train(task, agent, envs, eval_envs, args.seed, args.work_dir, args))


if __name__ == "__main__":
    main()
