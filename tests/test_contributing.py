"""The lists of CONTRIBUTING.md, followed: what they name is all that an addition touches.

A toy off-policy algorithm takes 2 places: its module and its YAML file (a test would be the third). A toy environment
takes 2 places: its module and its YAML file. Neither touches a file of the package.
"""

import re
import textwrap

import numpy as np
import pytest
from tests.small_runs import REPOSITORY, rows

from diffusion_rl.cli import app
from diffusion_rl.export import saved
from diffusion_rl.methods import off_policy
from diffusion_rl.reports import runs
from diffusion_rl.training.checkpoint import load_checkpoint

ALGORITHM = '''
    """Choosy imitation: the denoising loss on the actions of the buffer whose reward is above a bar."""

    import tensorflow as tf

    from diffusion_rl.methods.off_policy.algorithm import OffPolicy, Part
    from diffusion_rl.networks.layers import variables_of
    from diffusion_rl.policies.exploring import ExploringDiffusionPolicy


    class Choosy(OffPolicy, ExploringDiffusionPolicy):
        """A diffusion policy; arguments of `ExploringDiffusionPolicy`."""

        KIND = "choosy"
        LABEL = "Choosy imitation"
        TRAIN_KEYS = "actor n_critic_warmup_itr replay_ratio choosy_bar"

        def parts(self, settings):
            return {"actor": Part(variables_of(self.network), "actor_")}

        def draw(self, rng, rows, settings, train_actor):
            b = int(settings["batch_size"])
            noise = rng.normal((b, self.horizon_steps, self.action_dim))
            return {"rows": rows.online(b), "t": rng.integers(0, self.denoising_steps, (b,)), "noise": noise}

        def update(self, data, draws, step, settings, train_actor):
            batch = data.online.at(draws["rows"])
            above = tf.cast(batch.rewards > settings["choosy_bar"], self.dtype)

            def loss():
                errors = self.errors(batch.actions, {"state": batch.obs}, draws["t"], draws["noise"])
                return tf.reduce_mean(above * tf.reduce_mean(errors, axis=[1, 2]))

            return {"loss_actor": step("actor", loss, apply=train_actor)}
'''
ALGORITHM_YAML = """
    # @package _global_
    defaults:
      - /_base/run
      - /_base/task: hopper-medium
      - /_base/env: locomotion
      - /_base/algorithm: off_policy_diffusion
      - /_base/network@model.actor: diffusion_mlp_locomotion
      - _self_
    name: choosy
    denoising_steps: 3
    env: {n_envs: 2, max_episode_steps: 24, threads: 1}
    train:
      n_train_itr: 3
      n_steps: 8
      val_freq: 3
      batch_size: 8
      n_critic_warmup_itr: 0
      actor_lr: 1e-3
      actor_weight_decay: 0
      actor_lr_scheduler: {first_cycle_steps: 10, warmup_steps: 0, min_lr: 1e-3}
      scale_reward_factor: 1
      buffer_size: 100
      replay_ratio: 2
      choosy_bar: 1.0
    model: {_target_: MODULE.Choosy, actor: {mlp_dims: [16, 16, 16]}}
"""
ENVIRONMENT = '''
    """A point that is to be at the origin."""

    import gymnasium
    import numpy as np


    class Point(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,))
        action_space = gymnasium.spaces.Box(-1, 1, (2,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.place = self.np_random.uniform(-1, 1, 2)
            return self.place.astype(np.float32), {}

        def step(self, action):
            self.place = np.clip(self.place + 0.1 * action, -1, 1)
            return self.place.astype(np.float32), -float(np.abs(self.place).sum()), False, False, {"success": False}


    gymnasium.register("Point-v0", entry_point=Point)
'''
ENVIRONMENT_YAML = """
    # @package _global_
    defaults:
      - /gym/finetune/hopper-v2/ft_ppo_diffusion_mlp
      - _self_
    env_name: point
    obs_dim: 2
    action_dim: 2
    denoising_steps: 4
    ft_denoising_steps: 2
    normalization_path: null
    env: {name: "toy_point:Point-v0", n_envs: 2, max_episode_steps: 16}
    train: {n_train_itr: 3, n_steps: 8, val_freq: 3, batch_size: 8, update_epochs: 2}
    model: {network_path: null, actor: {mlp_dims: [16, 16, 16]}, critic: {mlp_dims: [16, 16, 16]}}
"""


def write(path, text):
    path.write_text(textwrap.dedent(text))


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Write a module and a YAML file; returns the arguments of script/run.py and the run's folder."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    for function in ("hydra._internal.logging_config.configure_logging", "logging.config.dictConfig"):
        monkeypatch.setattr(function, lambda config: None, raising=False)  # it would close pytest's handlers

    def files(module, source, name, yaml):
        write(tmp_path / f"{module}.py", source)
        write(tmp_path / f"{name}.yaml", yaml)
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
    command, folder = add(name, ALGORITHM, "ft_choosy", ALGORITHM_YAML.replace("MODULE", module))
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


def test_an_environment_is_one_module_and_one_yaml_file(add, capsys):
    command, folder = add("toy_point", ENVIRONMENT, "ft_point", ENVIRONMENT_YAML)
    assert app.main(command) == 0, capsys.readouterr().err
    assert [row["kind"] for row in rows(folder)] == ["eval", "train", "train"]
    assert all(-32 <= row["episode_return"] < 0 for row in rows(folder))


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
