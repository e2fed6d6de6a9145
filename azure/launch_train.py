"""What azure/launch.py starts: a job for each combination of these values."""

job = "train"  # or "values" or "plan": see python scripts/launch.py --help

params_to_sweep = {
    "dataset": ["walker2d-medium-expert-v2"],
    "horizon": [128, 512],
    "n_diffusion_steps": [100],
    "logbase": ["logs/pretrained"],
}
