"""Users' own environments: either they work or one line says what is wrong with which of them."""

from __future__ import annotations

import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("gymnasium", reason='needs pip install -e ".[gym]"')

from tests.sync_env import SyncVectorEnv  # noqa: E402

from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.data.normalizers import MinMaxNormalizer  # noqa: E402
from diffusion_rl.envs import processes, room  # noqa: E402
from diffusion_rl.envs.make import make_vector_env  # noqa: E402
from diffusion_rl.envs.vector import ProcessVectorEnv  # noqa: E402
from diffusion_rl.envs.worker import EnvRecipe  # noqa: E402
from diffusion_rl.training.rollout import collect, episode_statistics, success_threshold  # noqa: E402

TA = 2


def make(
    name: str = "Own", n_envs: int = 2, kind: Any = SyncVectorEnv, recipe: dict[str, Any] | None = None, **kwargs: Any
) -> Any:
    recipe = {"chunks": {"reset_within_step": True}, **(recipe or {})}
    return kind([EnvRecipe(f"own_envs:{name}-v0", kwargs=kwargs, **recipe)] * n_envs, TA, seeds=range(n_envs))


def zeros(venv: Any) -> np.ndarray:
    return np.zeros((venv.n_envs, TA, venv.action_dim))


def steps(venv: Any, n: int = 3) -> list[Any]:
    venv.reset()
    return [venv.step(zeros(venv)) for _ in range(n)]


def line(caught: Any) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) <= 320, text
    return text


# ------------------------------------------------------------------------------------------------------- what works


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("Own", {}),
        ("Own", {"pays": "array"}),
        ("Own", {"pays": "integer"}),
        ("OldReset", {}),
        ("OldWrapper", {}),
        ("OldStep", {}),
        ("Succeeds", {}),
        ("Own", {"info": {"success": {"task": True}, "nested": {"a": None}}}),
    ],
)
def test_it_works(name: str, kwargs: dict) -> None:
    results = steps(make(name, **kwargs))
    assert [result.rewards.tolist() for result in results] == [[2.0, 2.0]] * 3
    assert [bool(result.terminated.all()) for result in results] == [False, False, True]
    assert not any(result.truncated.any() for result in results)
    assert all(result.observations["state"].shape == (2, 1, 4) for result in results)
    assert all(result.observations["state"].dtype.kind == "f" for result in results)


def test_infos_that_no_pipe_carries_and_the_old_interface_under_gymnasiums_time_limit() -> None:
    venv = make("Limited", kind=ProcessVectorEnv)
    results = steps(venv)
    assert [result.rewards.tolist() for result in results] == [[2.0, 2.0], [1.0, 1.0], [2.0, 2.0]]
    assert results[1].truncated.all() and not results[1].terminated.any()
    assert results[1].infos["final_observations"]["state"][0, 0].tolist() == [3.0] * 4
    assert results[0].infos["executed_steps"].tolist() == [2, 2] and "final_observations" not in results[0].infos
    venv.close()


def test_an_old_reset_is_seeded_where_that_is_possible_and_the_user_is_told(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        venv = make("OldReset")
    assert "own_envs:OldReset-v0: its reset takes no seed" in caplog.text and len(caplog.records) == 1
    first = venv.reset()["state"]
    assert first[0, 0, 0] != first[1, 0, 0]
    venv.seed([0, 1])
    np.testing.assert_array_equal(venv.reset()["state"], first)


def test_vectors_of_a_dict_are_joined_in_the_spaces_order() -> None:
    venv = make(shows="goal", recipe={"obs_dim": 8})
    assert venv.obs_spec == {"state": (8,)}
    normalizer = MinMaxNormalizer(np.zeros(8), np.arange(1.0, 9.0), -np.ones(2), np.ones(2))
    shown = steps(make(shows="goal", recipe={"normalizer": normalizer}), 1)[0].observations["state"]
    np.testing.assert_allclose(shown[0, 0], 2 * (2 / (np.arange(1.0, 9.0) + 1e-6) - 0.5))


def test_a_dict_with_a_state(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        venv = make(shows="state")
    assert venv.obs_spec == {"state": (4,)}
    assert "of its observations extra, task are not used" in caplog.text


@pytest.mark.parametrize("normalised", [False, True])
def test_a_dict_with_state_and_pictures(normalised: bool) -> None:
    """Pictures come channels first, as bytes; the state is normalised."""
    bounds = MinMaxNormalizer(-np.ones(4), np.ones(4), -np.ones(2), np.ones(2)) if normalised else None
    venv = make(shows="seen", recipe={"normalizer": bounds})
    assert venv.obs_spec == {"rgb": (3, 16, 24), "state": (4,)}
    shown = steps(venv, 1)[0].observations
    assert shown["rgb"].shape == (2, 1, 3, 16, 24) and shown["rgb"].dtype == np.uint8 and (shown["rgb"] == 2).all()
    np.testing.assert_allclose(shown["state"], 2.0, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shows": "picture"}, r"pictures alone \[8, 8, 3\].*'state'.*'rgb'"),
        ({"shows": "seen as numbers"}, r"'rgb' must be bytes \(uint8\) or numbers in \[0, 1\]"),
        ({"shows": "matrix"}, r"vectors.*shape \[2, 2\]: flatten"),
        ({"shows": "class"}, r"gymnasium Box or Dict.*Discrete\(3\)"),
        ({"shows": "classes"}, r"a Dict without a vector \(a Discrete\(3\)\)"),
        ({"shows": "goal"}, r"obs_dim=5,.*achieved_goal \[2\], desired_goal \[2\], observation \[4\].*set obs_dim=8"),
        ({"name": "Classes"}, r"actions must be vectors.*Discrete\(3\)"),
        ({"recipe": {"render": True}}, "env.save_video=true.*takes no render_mode"),
    ],
)
def test_what_no_policy_can_take_is_refused_at_the_start(kwargs: dict, message: str) -> None:
    kwargs = {**kwargs, "recipe": {"obs_dim": 5, **kwargs.get("recipe", {})}}
    with pytest.raises(UserError, match=message) as caught:
        make(**kwargs)
    name = kwargs.get("name", "Own")
    assert line(caught).startswith(f"environment 0 (own_envs:{name}-v0): ")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gives": np.zeros((4, 1))}, r"has shape \[4, 1\], its observation_space says \[4\]"),
        ({"gives": [0.0] * 3}, r"has shape \[3\], its observation_space says \[4\]"),
        ({"gives": ["a"] * 4}, "has dtype <U1: an array of numbers is needed"),
        ({"gives": None, "shows": "goal", "pays": "none"}, r"its reward is None \(NoneType\): one number"),
        ({"gives": np.zeros(4), "shows": "goal"}, "is a ndarray, its observation_space says a Dict"),
        ({"gives": {"state": np.zeros(4), "rgb": np.zeros((16, 24, 3))}, "shows": "seen"}, "'rgb' has dtype float64"),
        ({"pays": "two"}, "its reward is .*: one number is needed"),
        ({"pays": "text"}, r"its reward is 1.0 \(str\): one number is needed"),
        ({"pays": "nan"}, r"its reward is not finite in step 1 of the episode \(it is nan\)"),
        ({"pays": "infinite"}, r"its reward is not finite in step 1 of the episode \(it is inf\)"),
        ({"gives": [0, 0, np.nan, 0]}, r"its observation 'state' is not finite in step 3 .*\(entry 2 is nan\)"),
        ({"gives": np.full(4, -np.inf)}, r"observation 'state' is not finite in step 3.*\(entry 0 is -inf\)"),
    ],
)
def test_what_an_environment_gives_wrongly_is_named(kwargs: dict, message: str) -> None:
    venv = make(**kwargs)
    with pytest.raises(UserError, match=message) as caught:
        steps(venv)
    assert line(caught).startswith("environment 0 (own_envs:Own-v0): ")


@pytest.mark.parametrize(
    ("name", "cause"), [("Fails", "RuntimeError: no licence ["), ("Leaves", "SystemExit: no server [")]
)
def test_what_a_worker_raises_is_one_line_that_begins_with_the_cause(name: str, cause: str) -> None:
    venv = make(name, kind=ProcessVectorEnv)
    with pytest.raises(UserError) as caught:
        steps(venv)
    text = line(caught)
    assert text.startswith(f"environment 0 failed: {cause}own_envs:{name}-v0, ") and "own_envs.py:" in text
    assert "Traceback" in str(caught.value.__cause__)


def test_a_traceback_in_one_line() -> None:
    frames = 'Traceback (most recent call last):\n  File "/a/b.py", line 3, in step\n    call()\n    ~~~~^^\n'
    assert processes.in_one_line(frames + "KeyError: 'x'\n") == "KeyError: 'x' [/a/b.py:3]"
    assert processes.in_one_line(frames + "ValueError: a\nb\n", "name") == "ValueError: a [name, /a/b.py:3]"
    assert processes.in_one_line(frames + "AssertionError\n") == "AssertionError [/a/b.py:3]"
    assert len(processes.in_one_line((frames + "E: ").replace("/a/", 500 * "a/") + 500 * "x", "name")) < 300


def test_a_worker_that_stands_still_is_named_after_a_time() -> None:
    config = {"name": "own_envs:Own-v0", "n_envs": 1, "specific": {"stands": True}, "worker_timeout": 0.5}
    venv = make_vector_env(config, obs_dim=4, action_dim=2, act_steps=TA, seed=0)
    venv.reset()
    pids, began = [lane._process.pid for lane in venv._lanes], time.monotonic()
    with pytest.raises(UserError, match=r"environment 0 \(own_envs:Own-v0\) stands still: no answer to step for 0.5 s"):
        venv.step(zeros(venv))
    assert time.monotonic() - began < 4 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    for wrong in (0, -1, "soon", float("nan"), True):
        with pytest.raises(UserError, match="env.worker_timeout="):
            make_vector_env({**config, "worker_timeout": wrong}, obs_dim=4, action_dim=2, act_steps=TA, seed=0)


def test_a_module_that_fails_when_it_is_imported(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "broken_envs.py").write_text("raise RuntimeError('no GPU\\nhere')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match="importing broken_envs failed: RuntimeError: no GPU .*broken_envs.py:1"
    ) as caught:
        make_vector_env({"name": "broken_envs:A-v0", "n_envs": 1}, obs_dim=4, action_dim=2, act_steps=1, seed=0)
    line(caught)


@pytest.mark.parametrize(
    ("num_img", "steps_seen", "shape", "message"),
    [
        (1, 1, (3, 16, 24), r"images \[C,H,W\] = \[3, 16, 24\], .* built for \[3, 16, 16\]: crop or scale"),
        (1, 1, (16, 16, 3), r"= \[16, 16, 3\], .* \[3, 16, 16\]: channels come first"),
        (2, 2, (3, 16, 16), r"= \[3, 16, 16\], .* \[6, 16, 16\]: crop"),
        (1, 1, None, r"no images in it.* \[C,H,W\] = \[3, 16, 16\]"),
        (2, 2, (6, 16, 16), None),
        (1, 2, (3, 16, 16), None),
    ],
)
def test_images_of_another_size_than_the_networks(
    num_img: int, steps_seen: int, shape: tuple[int, ...] | None, message: str | None
) -> None:
    from diffusion_rl.networks import vision
    from diffusion_rl.networks.vit import VitEncoder

    backbone = VitEncoder(cfg={"embed_dim": 8}, num_channel=3 * steps_seen, img_h=16, img_w=16)
    features = vision.ImageFeatures(backbone, 4, steps_seen, spatial_emb=4, num_img=num_img)
    network = type("Network", (), {"vision": features})()
    if message is None:
        vision.check_images(network, shape, "data")
    else:
        with pytest.raises(UserError, match="data: .*" + message) as caught:
            vision.check_images(network, shape, "data")
        line(caught)
    vision.check_images(object(), shape, "data")  # it does not see


def test_environments_that_show_other_images_are_refused_before_the_run() -> None:
    from diffusion_rl.networks.vision import ImageFeatures
    from diffusion_rl.networks.vit import VitEncoder
    from diffusion_rl.training import evaluation

    backbone = VitEncoder(cfg={"embed_dim": 8}, img_h=16, img_w=16)
    policy = type("Policy", (), {"network": type("N", (), {"vision": ImageFeatures(backbone, 4, spatial_emb=4)})()})()
    env = {"name": "own_envs:Own-v0", "n_envs": 1, "specific": {"shows": "seen"}}
    config = OmegaConf.create({"env": env, "obs_dim": 4, "action_dim": 2, "act_steps": 1})
    with pytest.raises(UserError, match=r"own_envs:Own-v0: images \[C,H,W\] = \[3, 16, 24\].*\[3, 16, 16\]") as caught:
        evaluation.make_venv(config, policy, 0)
    line(caught)


# ------------------------------------------------------------------------------------------------------ how many fit


@pytest.mark.parametrize("name", ["own_envs:Own-v0", "hopper-medium-v2", "avoiding-m5"])
def test_more_environments_than_fit_are_refused_before_the_first_is_made(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"env.n_envs=10000000000: .* set env.n_envs=\d+ or less") as caught:
        make_vector_env({"name": name, "n_envs": 10**10}, obs_dim=4, action_dim=2, act_steps=1, seed=0)
    assert time.monotonic() - began < 2 and "GB are free" in line(caught)


def test_a_million_processes_are_refused() -> None:
    with pytest.raises(UserError, match=r"env.n_envs=1000000: each environment takes about 5,000 kB"):
        make(n_envs=10**6, kind=ProcessVectorEnv)


def test_too_few_open_files_are_one_line(monkeypatch: Any) -> None:
    asked = {resource.RLIMIT_NOFILE: 128}
    monkeypatch.setattr(resource, "getrlimit", lambda what: (asked.get(what, resource.RLIM_INFINITY),) * 2)
    room.require_processes(2)
    with pytest.raises(UserError, match=r"env.n_envs=100: .*ulimit -n \d{3} before, or set env.n_envs=\d\d or less"):
        room.require_processes(100)
    asked[resource.RLIMIT_NPROC] = 50
    with pytest.raises(UserError, match=r"env.n_envs=100: .*ulimit -u allows 50: set env.n_envs=50 or less"):
        room.require_processes(100)


# ---------------------------------------------------------------------------------------------------------- success


@pytest.mark.parametrize("name", ["Succeeds", "IsSuccess"])
def test_an_environment_that_says_success_is_believed(name: str) -> None:
    """Two episodes of three chunks each, of which the first says in its second chunk that it has succeeded."""
    venv = make(name)
    rollout = collect(venv, lambda seen: (zeros(venv), {}), 6, venv.reset(), np.ones(2), TA)
    assert rollout.successes is not None
    assert rollout.successes[:, 0].tolist() == [False, True, False, False, False, False]
    found = episode_statistics(rollout, TA, None)
    assert found.n_episodes == 4 and found.success_rate == 0.5
    assert episode_statistics(rollout, TA, 1.0).success_rate == 1.0
    assert episode_statistics(rollout.first(3), TA, None).success_rate == 1.0


def test_an_environment_that_speaks_of_success_only_when_it_happens_is_believed_later_too() -> None:
    venv = make("Succeeds")
    venv.reset()
    venv._lanes[0]._env.env.unwrapped.key = venv._lanes[1]._env.env.unwrapped.key = "other"
    assert "success" not in venv.step(zeros(venv)).infos
    venv._lanes[0]._env.env.unwrapped.key = "success"
    assert venv.step(zeros(venv)).infos["success"].tolist() == [True, False]
    venv._lanes[0]._env.env.unwrapped.key = "other"
    assert venv.step(zeros(venv)).infos["success"].tolist() == [False, False]


def test_a_threshold_goes_before_what_environments_say_only_if_the_user_sets_it(monkeypatch: Any, caplog: Any) -> None:
    from diffusion_rl.training import rollout

    key = "best_reward_threshold_for_success"
    assert success_threshold({key: 3}, environments_say=False) == 3
    assert success_threshold({}, environments_say=False) == 0
    assert success_threshold({}, environments_say=True) is None
    monkeypatch.setattr(rollout, "set_by_user", lambda name: name == f"env.{key}")
    assert success_threshold({key: 3}, environments_say=True) == 3
    monkeypatch.setattr(rollout, "set_by_user", lambda name: False)
    rollout._say_unused.cache_clear()  # it is said once a process
    with caplog.at_level(logging.WARNING):
        assert success_threshold({key: 3}, environments_say=True) is None
    assert f"not env.{key}=3 of the task's file" in caplog.text


def test_what_the_user_sets(tmp_path: Path) -> None:
    """On the command line, or in the named file itself; not in a file that this one includes."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    from diffusion_rl.config.instantiate import set_by_user

    (tmp_path / "base.yaml").write_text("env: {threshold: 3, name: a}\n")
    (tmp_path / "own.yaml").write_text("defaults: [base, _self_]\nenv: {name: b}\n")
    (tmp_path / "explicit.yaml").write_text("defaults: [base, _self_]\nenv: {threshold: 4}\n")
    assert set_by_user("env.threshold")  # no command line
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        for name, overrides, expected in [
            ("own", [], False),
            ("own", ["env.threshold=5"], True),
            ("own", ["++env.threshold=5"], True),
            ("explicit", [], True),
        ]:
            HydraConfig.instance().set_config(compose(name, overrides, return_hydra_config=True))
            try:
                assert set_by_user("env.threshold") is expected
            finally:
                HydraConfig.instance().cfg = None
