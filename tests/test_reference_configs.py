"""Configurations in the form of the PyTorch reference run as they are."""

import pytest
from omegaconf import OmegaConf

from diffusion_rl.cli import app
from diffusion_rl.config.compose import compose
from diffusion_rl.config.instantiate import register_resolvers
from diffusion_rl.config.keys import check_arguments
from diffusion_rl.core.errors import UserError

EVALUATION = """
defaults: [_self_]
hydra: {run: {dir: "${logdir}"}}
_target_: agent.eval.eval_diffusion_agent.EvalDiffusionAgent
name: mine
logdir: ${oc.env:DPPO_LOG_DIR}/gym-eval/${name}
base_policy_path: x.pt
normalization_path: ${oc.env:DPPO_DATA_DIR}/gym/${env_name}/normalization.npz
seed: 42
device: cuda:0
env_name: hopper-medium-v2
obs_dim: 11
action_dim: 3
denoising_steps: 20
cond_steps: 1
horizon_steps: 4
act_steps: 4
n_steps: 500
render_num: 0
env:
  n_envs: 40
  name: ${env_name}
  max_episode_steps: 1000
  save_video: False
  best_reward_threshold_for_success: 3
  wrappers:
    mujoco_locomotion_lowdim: {normalization_path: "${normalization_path}"}
    multi_step:
      n_obs_steps: ${cond_steps}
      n_action_steps: ${act_steps}
      max_episode_steps: ${env.max_episode_steps}
      reset_within_step: True
wandb: {entity: "${oc.env:DPPO_WANDB_ENTITY}", project: a, run: b}
plotter: {_target_: env.plot_traj.TrajPlotter, env_type: toy}
model:
  _target_: model.diffusion.diffusion.DiffusionModel
  predict_epsilon: True
  denoised_clip_value: 1.0
  network_path: ${base_policy_path}
  network:
    _target_: model.diffusion.mlp_diffusion.DiffusionMLP
    time_dim: 16
    mlp_dims: [512, 512, 512]
    activation_type: ReLU
    residual_style: True
    cond_dim: ${eval:'${obs_dim} * ${cond_steps}'}
    horizon_steps: ${horizon_steps}
    action_dim: ${action_dim}
  horizon_steps: ${horizon_steps}
  obs_dim: ${obs_dim}
  action_dim: ${action_dim}
  denoising_steps: ${denoising_steps}
  device: ${device}
"""


@pytest.fixture
def compose_text(tmp_path, monkeypatch):
    for name in ("DPPO_DATA_DIR", "DPPO_LOG_DIR", "DPPO_WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)

    def composed(text, *overrides):
        (tmp_path / "theirs.yaml").write_text(text)
        config = compose("theirs", overrides, folder=tmp_path)
        del config.hydra
        return config

    return composed


def test_classes_arithmetic_and_environment(compose_text):
    config = app.prepare(compose_text(EVALUATION))
    assert config._target_ == "diffusion_rl.training.evaluation.Evaluation"
    assert config.model._target_ == "diffusion_rl.policies.diffusion.DiffusionPolicy"
    assert config.model.network.cond_dim == 11 and type(config.model.network.cond_dim) is int
    assert config.normalization_path == "data/gym/hopper-medium-v2/normalization.npz"
    assert config.logdir == "log/gym-eval/mine" and config.wandb is None and "plotter" not in config
    check_arguments(OmegaConf.to_container(config))


def test_everything_unknown_is_named_at_once(compose_text):
    wrong = EVALUATION.replace("mlp_diffusion.DiffusionMLP", "nobody.Net").replace("eval_diffusion_agent", "nobody")
    with pytest.raises(
        UserError, match="_target_=agent.eval.nobody.*model.network._target_=model.diffusion.nobody.Net"
    ):
        app.prepare(compose_text(wrong))
    with pytest.raises(UserError, match="'env.nothing'.*'nope'"):
        app.prepare(compose_text(EVALUATION + "nope: 1\n", "+env.nothing=2"))


def test_a_value_that_no_other_takes_is_an_error(compose_text):
    with pytest.raises(UserError, match="'use_ddim' does nothing here.*did you mean model.use_ddim"):
        app.prepare(compose_text(EVALUATION + "use_ddim: true\n"))
    config = app.prepare(compose_text(EVALUATION + "use_ddim: true\n", "+model.use_ddim=${use_ddim}"))
    assert config.model.use_ddim is True


@pytest.mark.parametrize(
    ("text", "value"),
    [("${eval:'3 * 4'}", 12), ("${round_up:2.1}", 3), ("${round_down:2.9}", 2), ("${eval:'- 3'}", -3)],
)
def test_resolvers(text, value):
    register_resolvers()
    assert OmegaConf.create({"a": text}).a == value


@pytest.mark.parametrize(
    "text", ["${eval:'__import__(\"os\")'}", "${eval:'open'}", "${round_up:'x'}", "${eval:'9**9**9'}"]
)
def test_resolvers_run_nothing(text):
    register_resolvers()
    with pytest.raises(Exception, match="arithmetic|calculate|too large"):
        OmegaConf.create({"a": text}).a  # noqa: B018
