"""Observe the same states in two generations of robosuite: `python robosuite_states.py GENERATION FILE`.

In 1.4 it writes states, joint by joint, and what is observed in them; in 1.5 it prints how far its observations are.
"""

import sys

import numpy as np

from diffusion_rl.data.sources.robomimic import low_dim_keys
from diffusion_rl.envs import robomimic

TASKS = ("lift", "can", "square", "transport")
WIDTHS = {0: 7, 2: 1, 3: 1}  # numbers of a joint's position by its kind: free, slide, hinge


def joints(model) -> dict[str, slice]:
    """Where each joint's position lies; 1.5 names a gripper's after its arm."""
    rows = enumerate(zip(model.jnt_qposadr, model.jnt_type, strict=True))
    named = ((model.joint(i).name.replace("_right_", "_", 1), start, kind) for i, (start, kind) in rows)
    return {name: slice(start, start + WIDTHS[kind]) for name, start, kind in named}


def states(env: robomimic.Robomimic):
    """A first state, and two after 20 drawn actions."""
    for seed in range(3):
        env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        for _ in range(20 if seed else 0):
            env.step(rng.uniform(-1, 1, env.base.action_dimension))
        yield seed


def main(generation: str, file: str) -> None:
    recorded = {} if generation == "1.4" else dict(np.load(file))
    for task in TASKS:
        meta = robomimic.read_env_meta(f"cfg/robomimic/env_meta/{task}.json") | {"robosuite": generation}
        keys = low_dim_keys(len(meta["env_kwargs"]["robots"]), with_object=True)
        base = robomimic.make_simulator(meta, low_dim_keys=keys, image_keys=[], render=False, seed=0)
        env = robomimic.Robomimic(base, keys)
        sim = base.env.sim
        places = joints(sim.model._model)
        if generation == "1.4":
            for seed in states(env):
                sim.forward()
                recorded |= {f"{task} {seed} {name}": sim.data.qpos[place].copy() for name, place in places.items()}
                recorded |= {f"{task} {seed} seen {key}": value for key, value in seen(env).items()}
        else:
            env.reset(seed=0)
            worst = max(distance(env, recorded, f"{task} {seed}", places) for seed in range(3))
            print(task, f"{worst:.1e}", flush=True)
        env.close()
    if generation == "1.4":
        np.savez(file, **recorded)


def seen(env: robomimic.Robomimic) -> dict[str, np.ndarray]:
    return env._pick(env.base.get_observation())


def distance(env: robomimic.Robomimic, recorded: dict, name: str, places: dict[str, slice]) -> float:
    """The largest difference of an observation of a recorded state."""
    sim = env.base.env.sim
    for joint, place in places.items():
        sim.data.qpos[place] = recorded[f"{name} {joint}"]
    sim.data.qvel[:] = 0
    sim.forward()
    return max(np.abs(value - recorded[f"{name} seen {key}"]).max() for key, value in seen(env).items())


main(*sys.argv[1:])
