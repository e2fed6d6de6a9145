"""What DiffuserLite's authors fixed for each task beyond their configuration files."""

from __future__ import annotations

from diffusion_rl.core.errors import UserError

HORIZONS = {"mujoco": (5, 5, 9), "kitchen": (4, 5, 5), "antmaze": (5, 5, 9)}  # states of the levels
LIMITS = {"mujoco": 1000, "kitchen": 280, "antmaze": 1000}  # steps of an episode
DIMS = {"hopper": (11, 3), "halfcheetah": (17, 6), "walker2d": (17, 6), "kitchen": (60, 9), "antmaze": (29, 8)}  # O, A
# Denoising steps; the diffusion backbone takes R1's.
STEPS = {"R1": {"mujoco": 3, "kitchen": 5, "antmaze": 5}, "R2": {"mujoco": 1, "kitchen": 2, "antmaze": 2}}
SCALES = {  # of returns, by task
    "halfcheetah-medium-expert": 3600,
    "halfcheetah-medium-replay": 1600,
    "halfcheetah-medium": 1700,
    "hopper-medium-expert": 1200,
    "hopper-medium-replay": 1000,
    "hopper-medium": 1000,
    "walker2d-medium-expert": 1600,
    "walker2d-medium-replay": 1300,
    "walker2d-medium": 1300,
    "kitchen-partial": 470,
    "kitchen-mixed": 400,
    "antmaze": 100,
}


def return_scale(task: str) -> float:
    """By which a task's returns are divided; longer names come first in the table."""
    for name, scale in SCALES.items():
        if task.startswith(name):
            return float(scale)
    raise UserError(f"no scale of returns is known for {task}: set task.return_scale=<a typical good return>")
