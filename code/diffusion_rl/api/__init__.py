"""What `import diffusion_rl` offers: policies, environments, trainings, evaluations and data sets in Python.

Every name is reached as `diffusion_rl.<name>`, which imports TensorFlow only once something needs it.
"""

NAMES = {  # name -> module of this package
    "load_policy": "policy",
    "LoadedPolicy": "policy",
    "Session": "policy",
    "make_env": "runs",
    "train": "runs",
    "evaluate": "runs",
    "Evaluated": "runs",
    "export_policy": "runs",
    "load_dataset": "datasets",
    "write_dataset": "datasets",
}
