"""env.render=true: environment 0 in a window, whichever simulator; nothing here opens one."""

import logging

import numpy as np
import pytest
from tests import small_runs

from diffusion_rl.cli import app
from diffusion_rl.config.compose import compose
from diffusion_rl.core.errors import UserError
from diffusion_rl.envs import make, video
from diffusion_rl.envs.d3il_avoiding import AvoidingVectorEnv
from diffusion_rl.envs.interface import EnvRequest
from diffusion_rl.envs.locomotion import LocomotionVectorEnv
from diffusion_rl.training.evaluation import Evaluation

HOPPER = {"name": "hopper-medium-v2", "n_envs": 2, "max_episode_steps": 8, "render": True}
SIZES = {"obs_dim": 11, "action_dim": 3, "act_steps": 2, "seed": 0}


class Seen(list):
    """Stands for `StateViewer`."""

    def __init__(self, load, camera):
        super().__init__()
        self.model = load()

    add = list.append

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: LocomotionVectorEnv("hopper-medium-v2", 2, max_episode_steps=8, render=True), 3),
        (lambda: AvoidingVectorEnv("avoiding-m5", 2, max_episode_steps=8, render=True), 2),
    ],
)
def test_every_step_of_the_first_environment_is_shown(build, size, monkeypatch):
    monkeypatch.setattr(video, "StateViewer", Seen)
    env = build()
    viewer = env._viewer
    env.reset()
    env.step(np.zeros((2, 3, size)))
    env.step_subset(np.array([1]), np.zeros((1, 3, size)))
    assert len(viewer) == 3 and all(len(state) == 1 + viewer.model.nq + viewer.model.nv for state in viewer)
    env.close()
    assert viewer.closed


@pytest.mark.parametrize("more", [{}, {"engine": "gymnasium"}, {"wrappers": {"robomimic_lowdim": {}}}])
def test_without_a_display_one_line_says_so(more, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="there is no display: leave it out, or set DISPLAY"):
        make.make_vector_env({**HOPPER, **more}, **SIZES)


def test_one_process_of_several_has_the_window(monkeypatch):
    made = []
    monkeypatch.setattr(make, "ProcessVectorEnv", lambda builders, *rest: made.extend(builders))
    request = EnvRequest("hopper-medium-v2", HOPPER, [0, 1], 1, {}, None, 11)
    make._made(request, "locomotion", "gymnasium")
    assert [recipe.render_mode for recipe in made] == ["human", None]
    filmed = EnvRequest("hopper-medium-v2", {**HOPPER, "save_video": True}, [0], 1, {}, None, 11)
    with pytest.raises(UserError, match="env.save_video=true exclude each other"):
        make._made(filmed, "locomotion", "gymnasium")


def test_a_gaussian_is_evaluated_with_the_documents_option(tmp_path, caplog):
    options = ["+ft_denoising_steps=10", "env.n_envs=1", "n_steps=2", f"logdir={tmp_path}"]
    composed = compose("d3il/eval/avoid_m1/eval_gaussian_mlp", options)
    del composed.hydra
    with caplog.at_level(logging.WARNING), small_runs.eagerly():
        Evaluation(app.prepare(composed)).run()
    assert "has no denoising steps: ft_denoising_steps=10 changes nothing" in caplog.text
    assert (tmp_path / "result.npz").is_file()
