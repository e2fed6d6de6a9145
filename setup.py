"""Packaging of diffusion-rl: the package lives below `code/`; simulators and tools are extras.

MANIFEST.in says what else ships.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import FileList

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "code/diffusion_rl/__init__.py").read_text()).group(1)

MUJOCO = "mujoco>=3.1.6,<5"
# Robosuite's boxes settle differently on later ones than in the data here; gymnasium-robotics' kitchen fails there.
OLDER_MUJOCO = "mujoco>=3.1.6,<3.5"

ORACLES = ["rliable>=1.2", "pandas<3"]  # the versions of arch that rliable takes fail with pandas 3
DOWNLOAD = ["gdown>=6.5,<7"]  # earlier ones neither go on after a broken connection nor notice a short answer
RAY = ["ray[default,train]>=2.60,<3"]
SWEEP = ["hydra-joblib-launcher>=1.2"]
# What robosuite uses of its own requirements in the tests: of the rest, pynput reads keyboards and needs a compiler, so
# `make test` installs robosuite without its requirements.
ROBOSUITE_NEEDS = [OLDER_MUJOCO, "numba", "scipy", "opencv-python-headless", "termcolor", "Pillow"]
ROBOSUITE_NEEDS += ["imageio[ffmpeg]"]
# hardware, clusters, packages that need numpy < 2 and a compiler, one that needs a compiler on some systems, the site
NOT_IN_ALL = ("robosuite15", "cuda", "ray", "cluster", "submitit", "d4rl", "kuka", "docs")

EXTRAS = {
    "gym": ["gymnasium>=1.0,<2", MUJOCO, "imageio[ffmpeg]"],
    # robosuite asks for numba, scipy and opencv itself
    "robomimic": ["robosuite==1.4.1", "gymnasium>=1.0,<2", OLDER_MUJOCO, "imageio[ffmpeg]"],
    # a second generation, in an environment of its own
    "robosuite15": ["robosuite>=1.5,<1.6", "gymnasium>=1.0,<2", "mujoco>=3.3,<3.5", "imageio[ffmpeg]"],
    # for its model of the Panda; not imported
    "d3il": ["robosuite==1.4.1", "gymnasium>=1.0,<2", OLDER_MUJOCO, "imageio"],
    "kitchen": ["gymnasium>=1.2,<2", "gymnasium-robotics==1.4.2", OLDER_MUJOCO, "imageio"],
    "mpe": ["mpe2>=1.0"],
    "kuka": ["gymnasium>=1.0,<2", "pybullet>=3.2.5; python_version < '3.13'"],  # later ones have no wheel
    "minari": ["gymnasium>=1.0,<2", "minari[hdf5]"],
    "lerobot": ["pyarrow"],
    # dm_control is not used; d4rl asks for it, and later ones for a MuJoCo that the other engine cannot use
    "d4rl": ["gymnasium>=1.0,<2", MUJOCO, "imageio", "d4rl==1.1", "gym==0.23.1", "mujoco-py==2.1.2.14"]
    + ["cython<3", "numpy<2", "packaging", "setuptools<70", "dm_control<1.0.37"],
    "download": DOWNLOAD,
    "figures": [],  # needs nothing more any longer
    "sweep": SWEEP,
    "submitit": ["hydra-submitit-launcher"],
    "parity": ["torch==2.13.0", "hypothesis", "einops", "pytest>=8"],
    "wandb": ["wandb"],
    "cuda": ["tensorflow[and-cuda]>=2.20,<2.22"],
    "cluster": RAY,
    "ray": [*RAY, "hydra-ray-launcher"],  # the launcher of sweeps; takes an older cloudpickle than joblib's
    "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1,<2"],
    "test": ["pytest>=8", "pytest-xdist", "pytest-cov>=7", "hypothesis", "ruff", "mypy", "import-linter>=2.10"]
    + [
        "nbclient",
        "ipykernel",
        "pyarrow",
        "mkdocs>=1.6,<2",
        *DOWNLOAD,
        *ORACLES,
        *SWEEP,
        *RAY,
        "submitit",
        *ROBOSUITE_NEEDS,
    ],
}
EXTRAS["all"] = sorted(
    {requirement for name, group in EXTRAS.items() if name not in NOT_IN_ALL for requirement in group}
)


class BuildWithShipped(build_py):
    """Copies what MANIFEST.in names (configurations, scripts, data) into diffusion_rl/shipped of a wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier build left would be in the wheel
            for name in shipped_files():
                target = Path(self.build_lib, "diffusion_rl", "shipped", name)
                self.mkpath(str(target.parent))
                self.copy_file(name, str(target))
        super().run()


def shipped_files():
    """Returns the files that MANIFEST.in names."""
    found = FileList()
    for line in (HERE / "MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            found.process_template_line(line)
    return sorted(set(found.files))


PAPERS = {"DPPO": "2409.00588", "Diffuser": "2205.09991", "DiffuserLite": "2401.15443"}

setup(
    name="diffusion-rl",
    version=VERSION,
    description="Diffusion policies and planners with reinforcement learning in TensorFlow: DPPO (Ren et al.), "
    "Diffuser (Janner et al.), DiffuserLite (Dong et al.), VAE + Diffusion RL",
    author="the diffusion-rl authors",
    project_urls={f"Paper: {name}": f"https://arxiv.org/abs/{number}" for name, number in PAPERS.items()},
    keywords="reinforcement-learning diffusion-policy planning robotics tensorflow",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "CITATION.cff"],
    cmdclass={"build_py": BuildWithShipped},
    entry_points={"console_scripts": ["diffusion-rl = diffusion_rl.cli.main:main"]},
    packages=find_packages("code"),
    package_dir={"": "code"},
    package_data={"diffusion_rl": ["py.typed", "**/*.json", "**/*.yaml", "**/*.xml", "**/*.npz", "**/*.csv"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "tensorflow>=2.20,<2.22",
        "tf-keras>=2.20,<2.22",
        "tensorboard",  # from TensorFlow 2.21 on it no longer comes with it
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
