"""`diffusion-rl COMMAND`: the scripts by name, and how messages spell them; where data lie in an installed package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_rl.cli.main import help_text
from diffusion_rl.config.compose import compose_job
from diffusion_rl.core import places, programs
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.programs import GROUPS, PROGRAMS

#: Scripts that are no commands: they need a checkout, or show how to do without one.
OTHERS = {"script/test_d3il_render.py", "script/dataset/ship_policy.py", "script/examples/act.py", "scripts/launch.py"}
OTHERS |= {"scripts/_checkout.py", "pipelines/_checkout.py", "conftest.py", "setup.py"}


def diffusion_rl(*words, cwd, flags=()):
    command = [sys.executable, *flags, "-m", "diffusion_rl", *words]
    environment = {**os.environ, "PYTHONPATH": str(places.REPOSITORY / "code")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_every_script_is_a_command():
    folders = ("", "script/", "script/dataset/", "script/examples/", "scripts/", "pipelines/", "plotting/")
    found = {str(path.relative_to(places.REPOSITORY)) for f in folders for path in places.REPOSITORY.glob(f"{f}*.py")}
    assert found == {*PROGRAMS.values()} | OTHERS and len(set(PROGRAMS.values())) == len(PROGRAMS)
    listed = "\n".join(map(help_text, ("", *GROUPS)))
    for name in {*PROGRAMS, *GROUPS}:
        assert re.search(rf"^  {name} +[A-Z].{{9,}}", listed, re.MULTILINE), name


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "run +Pre-train, fine-tune or evaluate"),
        (("plan",), "plan guided +Plan with guidance by a value"),
        (("run", "--help"), r"^usage: diffusion-rl run .* e\.g\. diffusion-rl run --config-name"),
        (("plan", "values", "--help"), r"^usage: diffusion-rl plan values(.|\n)*--discount +0.99"),
        (("lite", "kitchen", "--help"), "^usage: diffusion-rl lite kitchen task=NAME"),
        (("data", "convert", "--help"), r"^usage: diffusion-rl data convert (.|\n)*Example: diffusion-rl data convert"),
        (("demo", "--help"), "diffusion-rl run --help lists"),
    ],
)
def test_help_at_once(words, says, tmp_path):
    done = diffusion_rl(*words, cwd=tmp_path, flags=("-X", "importtime"))
    assert done.returncode == 0 and re.search(says, done.stdout), done.stdout
    assert not re.search(r"\| +tensorflow\b", done.stderr) and not re.search(r"python s|script/", done.stdout)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("pln",), "diffusion-rl has no command 'pln'"),
        (("plan", "guide"), "has no command 'plan guide'; did you mean plan guided"),
        (("run", "--config-name=no_such", "--config-dir=cfg/gym/eval/hopper-v2"), "no_such: no such configuration"),
        (("experiment", "-e", "none.yaml"), "none.yaml: No such file"),
    ],
)
def test_a_mistake_is_one_line(words, line, tmp_path):
    done = diffusion_rl(*words, cwd=tmp_path)
    assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_shipped_files_are_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose_job("eval_diffusion_mlp", folder="cfg/gym/eval/hopper-v2").n_steps == 250
    done = diffusion_rl("experiment", "-e", "exp_specs/dppo_hopper_seeds.yaml", "--dry-run", cwd=tmp_path)
    assert done.stdout.count(f"{places.REPOSITORY}/script/run.py") == 3, done.stderr
    Path("cfg").mkdir()
    assert places.here_or_shipped("cfg") == Path("cfg")


def test_messages_name_the_commands_of_the_place(monkeypatch):
    text = "train it (python script/run.py) or `python train.py`, scripts/train.py, python /a/script/run.py; "
    text += "pip install -e '.[gym]' (see installation/kitchen.md)"
    assert str(UserError(text)) == text
    monkeypatch.setattr(programs, "INSTALLED", True)
    monkeypatch.setattr(programs, "REPOSITORY", Path("/p/shipped"))
    here = "train it (diffusion-rl run) or `diffusion-rl train`, scripts/train.py, python /a/script/run.py; "
    here += "pip install 'diffusion-rl[gym]' (see /p/shipped/installation/kitchen.md)"
    assert str(UserError(text)) == here and programs.as_here(here) == here


def test_data_of_an_installed_package_are_the_users_or_what_ships(tmp_path, monkeypatch):
    """A folder is taken whole, so that data and the statistics of others are never mixed."""
    shipped, cache = tmp_path / "shipped", tmp_path / "cache" / "diffusion-rl" / "data"
    (shipped / "gym" / "a").mkdir(parents=True)
    monkeypatch.setattr(places, "INSTALLED", True)
    monkeypatch.setattr(places, "SHIPPED_DATA", shipped)
    monkeypatch.delenv("DPPO_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert places.data_dir() == cache
    for name in ("gym/a/x.npz", "data/gym/a/x.npz", cache / "gym/a/x.npz", shipped / "gym/a/x.npz"):
        assert places.data_file(Path(name)) == shipped / "gym/a/x.npz"
    assert places.data_file(Path("gym/b/x.npz")) == cache / "gym/b/x.npz"
    (cache / "gym" / "a").mkdir(parents=True)
    assert places.data_file(Path("gym/a/x.npz")) == cache / "gym/a/x.npz"
    monkeypatch.setenv("DPPO_DATA_DIR", str(tmp_path / "mine"))
    assert places.data_file(Path("gym/a/x.npz")) == tmp_path / "mine/gym/a/x.npz"
