"""The lists of CONTRIBUTING.md, followed: what they name is all that an addition touches.

A toy off-policy algorithm takes 2 places: its module and its YAML file (a test would be the third). A toy environment
takes 2 places: its module and its YAML file. Neither touches a file of the package.
"""

import re

import numpy as np
import pytest
from tests.pages import files
from tests.small_runs import FINE_TUNE, PRE_TRAIN, REPOSITORY, SMALL, rows

import diffusion_rl
from diffusion_rl.cli import app
from diffusion_rl.core.errors import UserError
from diffusion_rl.export import saved
from diffusion_rl.methods import off_policy
from diffusion_rl.reports import runs
from diffusion_rl.training.checkpoint import load_checkpoint

ALGORITHM, ENVIRONMENT, NETWORK = map(files, ("own_algorithm.ipynb", "own_environment.ipynb", "own_network.ipynb"))
OWN_NETWORK = "{_target_: gated.GatedDenoiser, action_dim: 3, horizon_steps: 4, cond_dim: 11}"


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Write a module and a YAML file; returns the arguments of script/run.py and the run's folder."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    for function in ("hydra._internal.logging_config.configure_logging", "logging.config.dictConfig"):
        monkeypatch.setattr(function, lambda config: None, raising=False)  # it would close pytest's handlers

    def files(module, source, name, yaml):
        (tmp_path / f"{module}.py").write_text(source)
        (tmp_path / f"{name}.yaml").write_text(yaml)
        folder = tmp_path / "run"
        return [f"--config-dir={tmp_path}", f"--config-name={name}", f"logdir={folder}", "tensorboard=false"], folder

    return files


@pytest.mark.parametrize("where", ["in the package", "own"])
def test_an_off_policy_algorithm_is_one_module_and_one_yaml_file(tmp_path, add, monkeypatch, capsys, where):
    inside = where == "in the package"
    if inside:  # as if the file lay in code/diffusion_rl/methods/off_policy
        monkeypatch.setattr(off_policy, "__path__", [*off_policy.__path__, str(tmp_path)])
    name = f"toy_choosy_{'inside' if inside else 'own'}"
    module = f"diffusion_rl.methods.off_policy.{name}" if inside else name
    yaml = ALGORITHM["my_cfg/ft_choosy.yaml"].replace("choosy.C", f"{module}.C")
    command, folder = add(name, ALGORITHM["choosy.py"], "ft_choosy", yaml)
    assert app.main(command) == 0, capsys.readouterr().err
    trained = [row for row in rows(folder) if row["kind"] == "train"]
    assert len(trained) == 2 and all(row["updates"] > 0 and np.isfinite(row["loss_actor"]) for row in trained)
    state = folder / "checkpoint" / "state_2.safetensors"
    assert load_checkpoint(state).metadata["kind"] == "choosy"

    assert app.main([*command, "train.eta=1"]) == 2
    assert "'train.eta' " in capsys.readouterr().err  # a key of another algorithm
    assert app.main([*command, "train.choosy_ber=1"]) == 2
    assert "train.choosy_bar" in capsys.readouterr().err  # did you mean …?

    small = ["denoising_steps=3", "model.network.mlp_dims=[16,16,16]", "env.n_envs=2", "env.max_episode_steps=24"]
    folders = [f"logdir={tmp_path / 'eval'}", "n_steps=8", "++ft_denoising_steps=0"]
    evaluate = ["--config-dir=cfg/gym/eval/hopper-v2", "--config-name=eval_diffusion_mlp"]
    assert app.main([*evaluate, *small, *folders, f"base_policy_path={state}"]) == 0, capsys.readouterr().err
    if inside:
        assert runs.declaring(off_policy.__name__, "LABEL")[f"{module}.Choosy"] == "Choosy imitation"
        assert saved.export_policy(state, "savedmodel").kind == "choosy"


@pytest.mark.slow
def test_a_network_is_one_class(tmp_path, monkeypatch, capsys):
    """One of one's own is pre-trained, fine-tuned and exported; a checkpoint alone has nothing imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "gated.py").write_text(NETWORK["gated.py"])
    for name, place, changes in (
        (PRE_TRAIN, "network", ["train.save_model_freq=2", "train.n_epochs=2"]),
        (FINE_TUNE, "actor", [f"base_policy_path={tmp_path / PRE_TRAIN}", "train.n_train_itr=2"]),
    ):
        small = [one for one in SMALL[name] if not one.startswith(f"model.{place}.")]
        own = [f"~model.{place}", f"+model.{place}={OWN_NETWORK}"]
        diffusion_rl.train(name, [*small, *own, *changes, f"logdir={tmp_path / name}"])
    folder = tmp_path / FINE_TUNE
    with pytest.raises(UserError, match=r"gated.GatedDenoiser is no network or policy of this package.*--allow"):
        diffusion_rl.load_policy(folder)
    policy = diffusion_rl.load_policy(folder, allow=["gated.GatedDenoiser"])
    exported = diffusion_rl.export_policy(policy, tmp_path / "exported")
    assert exported.deviation <= 1e-5 and policy.act(np.zeros(11), 0).shape == (4, 3)


def test_an_environment_is_one_module_and_one_yaml_file(add, capsys):
    yaml = ENVIRONMENT["my_cfg/ft_point.yaml"].replace("point:Point-v0", "toy_point:Point-v0")
    command, folder = add("toy_point", ENVIRONMENT["point.py"], "ft_point", yaml)
    assert app.main(command) == 0, capsys.readouterr().err
    assert [row["kind"] for row in rows(folder)] == ["eval", "train", "train"]
    assert all(-32 <= row["episode_return"] < 0 for row in rows(folder))
    seen = np.random.default_rng(0).uniform(-1, 1, (5, 1, 2))
    policy = diffusion_rl.load_policy(folder)  # which is in [-1, 1] without a normalization
    np.testing.assert_allclose(policy.normalizer.normalize_obs(seen), seen, atol=2e-6)
    assert policy.act(seen, 0).shape == (5, 4, 2)


def test_checklists_are_short_and_name_what_there_is():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    lists = text.split("\n## ")[1:]
    assert [part.splitlines()[0].split()[-1] for part in lists] == [
        *("algorithm", "environment", "network", "source", "figure"),
    ]
    for part in lists:
        assert 0 < len(re.findall(r"^\d+\. ", part, re.MULTILINE)) <= 10
    for name in re.findall(r"`((?:code|cfg|tests|script|figure|methods|policies|envs|data|interop)/[\w/.]+)`", text):
        places = [REPOSITORY / name, REPOSITORY / "code" / "diffusion_rl" / name]
        assert any(place.exists() for place in places), name
