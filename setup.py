"""Packaging of diffusion-rl: the package lives below `code/`; simulators and tools are extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "code/diffusion_rl/__init__.py").read_text()).group(1)

MUJOCO = "mujoco>=3.1.6,<3.5"  # from 3.5 on the engine no longer follows MuJoCo 2.1.0's trajectories

ORACLES = ["rliable>=1.2", "pandas<3"]  # the versions of arch that rliable takes fail with pandas 3
DOWNLOAD = ["gdown>=6.5,<7"]  # earlier ones neither go on after a broken connection nor notice a short answer
SWEEP = ["hydra-joblib-launcher>=1.2"]
# What robosuite uses of its own requirements in the tests: of the rest, pynput reads keyboards and needs a compiler, so
# `make test` installs robosuite without its requirements.
ROBOSUITE_NEEDS = ["numba", "scipy", "opencv-python-headless", "termcolor", "Pillow", "imageio[ffmpeg]"]
# hardware, clusters, packages that need numpy < 2 and a compiler, and one that needs a compiler on some systems
NOT_IN_ALL = ("cuda", "ray", "submitit", "d4rl", "kuka")

EXTRAS = {
    "gym": ["gymnasium>=1.0,<2", MUJOCO, "imageio[ffmpeg]"],
    # robosuite asks for numba, scipy and opencv itself; 1.5 has other controllers
    "robomimic": ["robosuite==1.4.1", "gymnasium>=1.0,<2", MUJOCO, "imageio[ffmpeg]"],
    "d3il": ["robosuite==1.4.1", "gymnasium>=1.0,<2", MUJOCO, "imageio"],  # for its model of the Panda; not imported
    "kitchen": ["gymnasium>=1.2,<2", "gymnasium-robotics==1.4.2", MUJOCO, "imageio"],
    "mpe": ["mpe2>=1.0"],
    "kuka": ["gymnasium>=1.0,<2", "pybullet>=3.2.5"],
    "minari": ["gymnasium>=1.0,<2", "minari[hdf5]"],
    # dm_control is not used; d4rl asks for it, and later ones for a MuJoCo that the other engine cannot use
    "d4rl": ["gymnasium>=1.0,<2", MUJOCO, "imageio", "d4rl==1.1", "gym==0.23.1", "mujoco-py==2.1.2.14"]
    + ["cython<3", "numpy<2", "packaging", "setuptools<70", "dm_control<1.0.37"],
    "download": DOWNLOAD,
    "figures": [],  # needs nothing more any longer
    "sweep": SWEEP,
    "submitit": ["hydra-submitit-launcher"],
    "parity": ["torch==2.13.0", "hypothesis", "einops", "pytest>=8"],
    "wandb": ["wandb"],
    "cuda": ["tensorflow[and-cuda]>=2.20,<2.21"],
    "ray": ["ray", "hydra-ray-launcher"],
    "test": ["pytest>=8", "pytest-xdist", "pytest-cov>=7", "hypothesis", "ruff", "mypy", "import-linter>=2.10"]
    + ["nbclient", "ipykernel", *DOWNLOAD, *ORACLES, *SWEEP, *ROBOSUITE_NEEDS],
}
EXTRAS["all"] = sorted(
    {requirement for name, group in EXTRAS.items() if name not in NOT_IN_ALL for requirement in group}
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
    package_data={"diffusion_rl": ["py.typed", "**/*.json", "**/*.yaml", "**/*.xml", "**/*.npz", "**/*.csv"]},
    python_requires=">=3.10,<3.13",
    install_requires=[
        "tensorflow>=2.20,<2.21",
        "tf-keras>=2.20,<2.21",
        "tensorboard",
        "setuptools<81",  # TensorBoard asks for pkg_resources, which later ones no longer have
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
