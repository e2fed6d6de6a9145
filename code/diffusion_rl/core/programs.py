"""The programs: as scripts of a checkout and as commands of `diffusion-rl`, which runs the same scripts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from diffusion_rl.core.places import INSTALLED, REPOSITORY

COMMAND = "diffusion-rl"
GO_ON = "resume=auto"  # what goes on with a run that was stopped
#: The programs: the words after `diffusion-rl`, and the script that is run.
PROGRAMS = {
    "run": "script/run.py",
    "demo": "script/demo.py",
    "figures": "script/make_figures.py",
    "reproduce": "script/reproduce.py",
    "export": "script/export_policy.py",
    "convert": "script/convert_checkpoint.py",
    "download": "script/download.py",
    "train": "train.py",
    "evaluate": "script/evaluate_experiment.py",
    "experiment": "run_experiment.py",
    "plan train": "scripts/train.py",
    "plan values": "scripts/train_values.py",
    "plan resume": "scripts/resume_training.py",
    "plan guided": "scripts/plan_guided.py",
    "plan unguided": "scripts/plan_unguided.py",
    "plan maze2d": "scripts/plan_maze2d.py",
    "plan results": "scripts/read_results.py",
    "plan table": "plotting/table.py",
    "plan kuka": "scripts/plan_kuka.py",
    "plan kuka-train": "scripts/train_kuka.py",
    "plan kuka-classifier": "scripts/train_kuka_classifier.py",
    "lite mujoco": "pipelines/diffuserlite_d4rl_mujoco.py",
    "lite kitchen": "pipelines/diffuserlite_d4rl_kitchen.py",
    "lite antmaze": "pipelines/diffuserlite_d4rl_antmaze.py",
    "data convert": "script/dataset/convert.py",
    "data convert-robomimic": "script/dataset/process_robomimic_dataset.py",
    "data validate": "script/dataset/validate.py",
    "data gym": "script/dataset/make_gym_data.py",
    "data maze2d": "script/dataset/make_maze2d_data.py",
    "data mpe": "script/dataset/make_mpe_data.py",
    "data robomimic": "script/dataset/make_robomimic_demos.py",
    "data robomimic-pictures": "script/dataset/render_robomimic_demos.py",
    "data avoiding": "script/dataset/make_avoiding_demos.py",
    "data avoiding-replay": "script/dataset/replay_avoiding.py",
}
GROUPS = {
    "plan": "Diffuser: train, guided, maze2d, results and others",
    "lite": "DiffuserLite: mujoco, kitchen, antmaze",
    "data": "Data sets: convert, validate, and makers of home-made ones",
}
_NAMES = {script: name for name, script in PROGRAMS.items()}
_WRITTEN = re.compile(r"\bpython\s+(" + "|".join(map(re.escape, PROGRAMS.values())) + r")\b")
_EXTRA = re.compile(r"""pip install -e (['"])\.\[""")
_PAGE = re.compile(r"(?<![\w./-])installation/")


def as_here(text: str) -> str:
    """Returns a text in which programs, extras and pages are named as they are where it is read.

    `python script/run.py` becomes `diffusion-rl run` in an installed package, and for who has called it so.
    """
    if not INSTALLED and not "".join(sys.argv[:1]).startswith(f"{COMMAND} "):
        return text
    text = _WRITTEN.sub(lambda found: f"{COMMAND} {_NAMES[found[1]]}", text)
    if INSTALLED:
        text = _PAGE.sub(f"{REPOSITORY}/installation/", _EXTRA.sub(rf"pip install \1{COMMAND}[", text))
    return text


def script() -> Path:
    """Returns the script that this process runs."""
    return Path(PROGRAMS.get(sys.argv[0].removeprefix(f"{COMMAND} "), sys.argv[0]))
