"""Packaging of diffusion-rl: the package lives below `code/`; simulators and tools are extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "code/diffusion_rl/__init__.py").read_text()).group(1)

MUJOCO = "mujoco>=3.1.6,<3.5"  # from 3.5 on the engine no longer follows MuJoCo 2.1.0's trajectories

EXTRAS = {
    "gym": ["gymnasium>=1.0,<2", MUJOCO, "imageio"],
    "robomimic": ["robosuite==1.4.1", MUJOCO, "imageio", "numba"],
    "d3il": [MUJOCO, "imageio"],
    "kitchen": ["gymnasium>=1.0,<2", "gymnasium-robotics", MUJOCO, "imageio"],
    "d4rl": ["gymnasium>=1.0,<2", "minari[hdf5]"],
    "parity": ["torch==2.13.0", "hypothesis", "einops", "pytest>=8"],
    "wandb": ["wandb"],
    "cuda": ["tensorflow[and-cuda]>=2.20,<2.21"],
    "ray": ["ray", "hydra-ray-launcher"],
    "test": ["pytest>=8", "pytest-xdist", "hypothesis", "ruff", "mypy"],
}
EXTRAS["all"] = sorted(
    {requirement for name, group in EXTRAS.items() if name not in ("cuda", "ray") for requirement in group}
)

setup(
    name="diffusion-rl",
    version=VERSION,
    description="Fine-tuning diffusion policies with reinforcement learning, in TensorFlow",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages("code"),
    package_dir={"": "code"},
    package_data={"diffusion_rl": ["**/*.json", "**/*.yaml", "**/*.xml", "**/*.npz"]},
    python_requires=">=3.10,<3.13",
    install_requires=[
        "tensorflow>=2.20,<2.21",
        "tf-keras>=2.20,<2.21",
        "tensorflow-probability>=0.25,<0.26",
        "hydra-core>=1.3,<1.4",
        "numpy>=1.26",
        "h5py",
        "safetensors",
        "matplotlib",
        "tqdm",
    ],
    extras_require=EXTRAS,
)
