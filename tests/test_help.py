"""`--help` of every program: keys, values and meanings, without TensorFlow."""

import re
import subprocess
import sys

import pytest

from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.config.overrides import comments, help_rows
from diffusion_rl.config.schema import FLAGS
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.methods.diffuser import options as diffuser
from diffusion_rl.methods.diffuser_lite import options as diffuser_lite
from diffusion_rl.methods.vae_latent import options as vae_latent

HOPPER = ("--config-dir=cfg/gym/finetune/hopper-v2", "--config-name=ft_ppo_diffusion_mlp")
PROGRAMS = {
    "script/run.py": r"--config-dir=DIR",
    "scripts/train.py": r"--horizon +32 +steps of a plan",
    "scripts/train_values.py": r"--discount +0.99 +discount of returns",
    "scripts/resume_training.py": r"--resume +False",
    "scripts/plan_guided.py": r"--scale +0.1 +scale of the guide's gradient",
    "scripts/plan_unguided.py": r"--aggregate +mean",
    "scripts/plan_maze2d.py": r"--conditional +False +draw a new goal",
    "scripts/train_kuka.py": r"--dim +128 +width",
    "scripts/train_kuka_classifier.py": r"--time_dim +128 +width",
    "scripts/plan_kuka.py": r"--task +unconditional +what is stacked",
    "scripts/launch.py": r"--trials +150",
    "scripts/read_results.py": r"--logbase +None +folder of the plans",
    "plotting/table.py": r"--labels +None +a JSON file",
    "pipelines/diffuserlite_d4rl_mujoco.py": r"task.w_cfg_R1 +\S+ +weight of R1's guidance",
    "pipelines/diffuserlite_d4rl_kitchen.py": r"num_candidates +64 +plans of which",
    "pipelines/diffuserlite_d4rl_antmaze.py": r"upstream_typo +false",
    "train.py": r"latent_clip +3.0 +bound on estimates",
    "script/evaluate_experiment.py": r"load_steps +steps of the checkpoints",
    "run_experiment.py": r"num_workers +runs at a time",
    "script/demo.py": r"key=value",
    "script/convert_checkpoint.py": r"IN",
    "script/export_policy.py": r"--format",
    "script/make_figures.py": r"learning_curve",
    "script/reproduce.py": r"--budget",
    "script/dataset/convert.py": r"--max-episodes",
    "script/dataset/make_gym_data.py": r"--replay-ratio",
    "script/dataset/make_maze2d_data.py": r"--steps",
    "script/dataset/ship_policy.py": r"--bits",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_at_once(program):
    command = [sys.executable, "-X", "importtime", program, "--help"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and re.search(PROGRAMS[program], ended.stdout), ended.stdout + ended.stderr
    assert not re.search(r"\| +tensorflow\b", ended.stderr), "TensorFlow is imported, which takes seconds"


def test_help_takes_the_other_arguments_into_account():
    shown = diffuser.help_text("train", ["--help", "--horizon", "8", "--dataset", "walker2d-medium-v2"])
    assert re.search(r"--horizon +8 ", shown) and "diffusion/defaults_H8_T20" in shown
    assert re.search(r"--dataset +walker2d-medium-v2", shown)
    assert re.search(r"depth +3 ", diffuser_lite.help_text("diffuserlite_d4rl_mujoco", ["-h", "depth=3"]))


@pytest.mark.parametrize("name", diffuser.COMMANDS)
def test_every_option_of_a_planner_has_a_meaning(name):
    values = diffuser.parse_command(name, []).as_dict()
    known = comments(*diffuser.SHIPPED).keys() | {"dataset", "config", "exp_name", "savepath", "resume"}
    assert not values.keys() - known


def test_every_option_of_the_others_has_a_meaning():
    files = sorted(diffuser_lite.FOLDER.glob("*.yaml"))
    assert len(files) == 3
    assert not set().union(*map(read_yaml, files)) - comments(*files).keys()
    assert not vae_latent.default_settings().keys() - comments(vae_latent.DEFAULTS).keys() - {*vae_latent.REGISTRY}


def test_what_is_described_exists():
    assert not vae_latent.KINDS.keys() - vae_latent.default_settings().keys() - {"stop_at"}
    used = [
        own.get("options", {}) for path in diffuser.SHIPPED for own in read_yaml(path).values() if type(own) is dict
    ]
    assert not diffuser.KINDS.keys() - set().union(*used) - {"stop_at"}


def test_comments_beside_keys(tmp_path):
    (tmp_path / "a.yaml").write_text("# b: none\na: 1  # the first\nb: 'x#y'\nc:\n  d: [1, 2] # a list # indeed\n")
    assert comments(tmp_path / "a.yaml") == {"a": "the first", "d": "a list # indeed"}


def test_rows_are_spelt_as_the_program_takes_them():
    assert help_rows({"a": None, "bb": True}, {"a": "x"}, FLAGS).split() == ["--a", "None", "x", "--bb", "True"]
    assert help_rows({"a": None, "b": True}, {}).split() == ["a", "null", "b", "true"]


@pytest.mark.parametrize(
    ("command", "first"),
    [
        (f"script/run.py --help {' '.join(HOPPER)}", "usage: python script/run.py"),
        ("plotting/table.py", r"\definecolor"),
    ],
)
def test_what_is_printed_may_be_cut(command, first):
    cut = f"{sys.executable} {command} | (exec <&-; sleep 0.2); {sys.executable} {command} | head -n 1"
    ended = subprocess.run(cut, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.stdout.startswith(first) and not ended.stderr
