"""Environments that tests put into clusters; without TensorFlow."""

HOPPER = {"name": "hopper-medium-v2", "n_envs": 5, "max_episode_steps": 60}
HOPPER |= {"wrappers": {"multi_step": {"n_action_steps": 4, "reset_within_step": True}}}
HOPPER_DIMS = {"obs_dim": 11, "action_dim": 3, "act_steps": 4, "seed": 7}
