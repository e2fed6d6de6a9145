"""Run the scripted experts of robomimic's tasks: `python robosuite_experts.py GENERATION EPISODES`."""

import sys

import numpy as np

from diffusion_rl.data.sources.robomimic import low_dim_keys
from diffusion_rl.envs import robomimic
from diffusion_rl.envs.robomimic_experts import plans

STEPS = {"lift": 300, "can": 300, "square": 400, "transport": 800}


def succeeds(env: robomimic.Robomimic, task: str, seed: int) -> bool:
    env.reset(seed=seed)
    arms = plans(task, env.base.env)
    for _ in range(STEPS[task]):
        reward = env.step(np.concatenate([next(arm, np.zeros(7)) for arm in arms]))[1]
        if reward > 0:
            return True
    return False


for task in STEPS:
    meta = robomimic.read_env_meta(f"cfg/robomimic/env_meta/{task}.json") | {"robosuite": sys.argv[1]}
    keys = low_dim_keys(len(meta["env_kwargs"]["robots"]), with_object=True)
    base = robomimic.make_simulator(meta, low_dim_keys=keys, image_keys=[], render=False, seed=0)
    env = robomimic.Robomimic(base, keys)
    seen = [env.reset(seed=seed)[0]["object"] for seed in (3, 4, 3)]
    assert np.array_equal(seen[0], seen[2]) and not np.array_equal(seen[0], seen[1])
    episodes = int(sys.argv[2])
    print(f"{task}: {sum(succeeds(env, task, seed) for seed in range(episodes))} of {episodes}", flush=True)
    env.close()
