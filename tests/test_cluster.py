"""Simulators at Ray actors give what they give on one machine, to the bit, whatever is lost on the way."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tests.cluster_cases import HOPPER, HOPPER_DIMS
from tests.small_runs import (
    FINE_TUNE,
    arguments,
    assert_same_checkpoint,
    loop,
    make_base_policy,
    rows,
    run,
    start,
    states,
)

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import REPOSITORY
from diffusion_rl.envs.make import make_vector_env, plan_vector_env
from diffusion_rl.interop.torch_names import state_dict

ray = pytest.importorskip("ray")

from diffusion_rl.cluster.remote import RemoteVectorEnv  # noqa: E402
from diffusion_rl.cluster.session import ClusterSettings  # noqa: E402

PENDULUM = {**HOPPER, "name": "tests.drawn_env:Drawn-v0", "engine": "gymnasium"}
PENDULUM_DIMS = {"obs_dim": 3, "action_dim": 2, "act_steps": 4, "seed": 7}
CASES = {"restored": (HOPPER, HOPPER_DIMS), "repeated": (PENDULUM, PENDULUM_DIMS)}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    yield
    ray.shutdown()


def remote(case, actors=3, **settings):
    env, dims = CASES[case]
    return RemoteVectorEnv(plan_vector_env(env, **dims), ClusterSettings(actors=actors, **settings))


def history(venv, dims, n_steps=30, between=lambda step: None):
    """Returns everything that environments say in some steps, two resets among them."""
    rng = np.random.default_rng(0)
    said = [venv.reset()["state"]]
    for step in range(n_steps):
        between(step)
        if step == n_steps // 2:
            said.append(venv.reset()["state"])
        result = venv.step(rng.uniform(-1, 1, (venv.n_envs, 4, dims["action_dim"])))
        said += [result.observations["state"], result.rewards, result.terminated, result.truncated]
        said += [result.infos["executed_steps"], result.infos.get("final_observations", {"state": 0})["state"]]
    return said


def local_history(case):
    env, dims = CASES[case]
    venv = make_vector_env(env, **dims)
    said = history(venv, dims)
    venv.close()
    return said


def assert_same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


def pids(venv):
    return [shard.facts.pid for shard in venv._shards]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("actors", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_same_to_the_bit_at_any_number_of_actors(case, actors):
    venv = remote(case, actors)
    assert_same(history(venv, CASES[case][1]), local_history(case))
    assert venv.measured() == {"actors_lost": 0, "calls_repeated": 0}
    venv.close()


@pytest.mark.parametrize("case", ["restored", pytest.param("repeated", marks=pytest.mark.slow)])
def test_killed_actors_change_nothing(case, caplog):
    venv = remote(case)
    killed = []

    def between(step):
        if step in (0, 4, 17, 28):
            pid = venv._shards[step % 3].facts.pid if step else pids(venv)[0]
            if pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    assert_same(history(venv, CASES[case][1], between=between), local_history(case))
    lost = venv.measured()
    assert lost["actors_lost"] == len(killed) >= 3
    assert "others repeat" in caplog.text
    venv.close()


def test_what_environments_say_is_one_line():
    venv = remote("repeated")
    venv.reset()
    actions = np.zeros((venv.n_envs, 4, 2))
    actions[3, 2] = 9
    with pytest.raises(UserError, match="this action is far out"):
        venv.step(actions)
    venv.close()


def test_states_go_to_one_machine_and_back():
    env, dims = CASES["restored"]
    venv, here = remote("restored"), make_vector_env(env, **dims)
    assert_same(history(venv, dims), history(here, dims))
    state = venv.get_state()
    for key, value in here.get_state().items():
        np.testing.assert_array_equal(value, state[key])
    following = history(here, dims)
    venv.set_state(state)
    assert_same(history(venv, dims), following)
    with pytest.raises(UserError, match="rows, there are 5"):
        venv.set_state({key: value[:2] for key, value in state.items()})
    venv.close()


def test_simulators_do_without_tensorflow():
    program = """
import sys
from diffusion_rl.cluster.simulators import Simulators
from diffusion_rl.envs.make import plan_vector_env
from tests.cluster_cases import HOPPER, HOPPER_DIMS
Simulators().build(plan_vector_env(HOPPER, **HOPPER_DIMS))
print("mujoco" in sys.modules, "tensorflow" in sys.modules)
"""
    paths = os.pathsep.join([str(REPOSITORY / "code"), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


def trained(folder, *options, watch=None):
    """Weights and metrics after a small fine-tuning; watch: is given the environments after each rollout."""
    base = make_base_policy(folder / "base.safetensors")
    built = loop(FINE_TUNE, folder / "run", f"base_policy_path={base}", *options)
    collect_ = built._collect

    def collected(on_step):
        rollout = collect_(on_step)
        if watch is not None:
            watch(built.venv)
        return rollout

    built._collect = collected
    rows = built.run()
    return state_dict(built.model), rows


@pytest.mark.slow
def test_a_training_in_a_cluster_is_that_of_one_machine(tmp_path):
    here, _ = trained(tmp_path / "here")
    there, _ = trained(tmp_path / "there", "++env.cluster=ray", "++env.actors=2")
    assert_weights(there, here)


@pytest.mark.slow
def test_wide_collecting_repeats_what_lost_actors_did(tmp_path):
    wide = ("++env.cluster=ray", "++env.actors=2", "++env.collect=wide")
    killed = []

    def kill(venv):
        if not killed:
            killed.append(os.kill(venv._shards[1].facts.pid, signal.SIGKILL))

    one, _ = trained(tmp_path / "one", *wide)
    other, metrics = trained(tmp_path / "other", *wide, watch=kill)
    assert sum(row["actors_lost"] for row in metrics) == 1
    assert_weights(other, one)


def assert_weights(ours, theirs):
    for name, value in theirs.items():
        np.testing.assert_array_equal(value, ours[name], err_msg=name)


@pytest.mark.parametrize("option", ["env.collect=wide", "env.actors=2", "env.nodes=2", "env.spares=1"])
def test_what_only_a_cluster_reads_needs_one(tmp_path, option):
    base = make_base_policy(tmp_path / "base.safetensors")
    with pytest.raises(UserError, match=f"{option} does nothing without a cluster: add env.cluster=ray"):
        loop(FINE_TUNE, tmp_path / "run", f"base_policy_path={base}", f"++{option}")


def test_what_cannot_be_repeated_begins_anew(monkeypatch, caplog):
    monkeypatch.setattr("diffusion_rl.cluster.shard.LONGEST_JOURNAL", 6)
    venv = remote("repeated", 2)
    first, chunk = venv.reset()["state"], np.zeros((5, 4, 2))
    results = [venv.step(chunk) for _ in range(8)]
    os.kill(venv._shards[0].facts.pid, signal.SIGKILL)
    time.sleep(0.5)
    results.append(venv.step(chunk))
    assert results[-1].truncated.tolist() == [True, True, False, False, False]
    assert results[-1].rewards[:2].tolist() == [0, 0] and results[-1].infos["executed_steps"].tolist() == [
        0,
        0,
        4,
        4,
        4,
    ]
    np.testing.assert_array_equal(
        results[-1].infos["final_observations"]["state"][:2], results[-2].observations["state"][:2]
    )
    assert not np.isin(results[-1].observations["state"][:2], first).any()
    assert "new episodes begin" in caplog.text
    venv.step(chunk)
    venv.close()


@pytest.mark.slow
def test_a_spare_takes_over_from_one_that_is_late(caplog):
    venv, stopped = remote("restored", 2, spares=1), []

    def between(step):
        if step == 20:
            stopped.append(venv._shards[0].facts.pid)
            os.kill(stopped[0], signal.SIGSTOP)

    assert_same(history(venv, HOPPER_DIMS, between=between), local_history("restored"))
    os.kill(stopped[0], signal.SIGKILL)
    assert "are late: a spare actor joins in" in caplog.text
    venv.close()


@pytest.mark.slow
def test_a_driver_that_is_killed_twice_goes_on(tmp_path):
    base = make_base_policy(tmp_path / "base.safetensors")
    options = [f"base_policy_path={base}", "train.save_model_freq=1", "train.n_train_itr=12"]
    cluster = ["++env.cluster=ray", "++env.actors=2"]
    run(FINE_TUNE, tmp_path / "here", *options)
    for killed_after in (3, 7, None):
        resume = [] if killed_after == 3 else [f"resume={tmp_path / 'there'}"]
        process = start(arguments(FINE_TUNE, tmp_path / "there", *options, *cluster, *resume))
        while killed_after is not None and process.poll() is None:
            if (tmp_path / "there/metrics.jsonl").is_file() and len(rows(tmp_path / "there")) >= killed_after:
                process.kill()
            time.sleep(0.02)
        _, errors = process.communicate()
        assert process.returncode == (0 if killed_after is None else -9), errors
    last = states(tmp_path / "here")[-1]
    assert_same_checkpoint(*(tmp_path / name / "checkpoint" / last for name in ("here", "there")))
    assert [row["itr"] for row in rows(tmp_path / "there")] == list(range(12))
