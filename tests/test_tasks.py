"""The registry of tasks agrees with the simulators, the configurations and itself."""

import importlib.util
import sys
import types

import pytest

from diffusion_rl.config.compose import CONFIG_ROOT
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.make import make_vector_env
from diffusion_rl.envs.toy_agents import ToyAgentsVectorEnv
from diffusion_rl.envs.worker import simulator_named
from diffusion_rl.methods.diffuser_lite.domains import DOMAINS, return_scale
from diffusion_rl.tasks import registry
from diffusion_rl.tasks.registry import TASKS, d4rl_file, task_named, tasks_of


def test_each_name_belongs_to_its_own_task():
    assert len({task.name for task in TASKS}) == len(TASKS)
    for task in TASKS:
        assert task_named(task.name) is task and task_named(f"{task.name}-x-v2") is task
    assert task_named("hopperlike-v0") is None and task_named("Hopper-v4") is None


def test_simulators_are_modules_that_build_environments():
    from diffusion_rl import envs

    for task in TASKS:
        if task.simulator:
            assert importlib.util.find_spec(f"{envs.__name__}.{task.simulator}")
    assert simulator_named("hopper-medium-v2") == "locomotion" and simulator_named("kitchen-mixed-v0") == "kitchen"
    assert simulator_named("my_pkg:Thing-v0") == simulator_named("can-v0") == "own"


@pytest.mark.parametrize("name", [task.name for task in tasks_of(simulator="locomotion")])
def test_dimensions_and_limit_are_the_simulators(name):
    pytest.importorskip("mujoco")
    from diffusion_rl.envs.locomotion import TASKS as PHYSICS
    from diffusion_rl.envs.locomotion import LocomotionPhysics

    physics, task = LocomotionPhysics(name), task_named(name)
    assert set(PHYSICS) == {task.name for task in tasks_of(simulator="locomotion")}
    assert (physics.obs_dim, physics.action_dim) == task.dims


def test_every_task_of_diffuser_lite_has_its_facts():
    files = sorted((CONFIG_ROOT / "planning" / "diffuserlite" / "task").glob("*.yaml"))
    assert len(files) > 10
    for path in files:
        name = read_yaml(path)["env_name"]
        task = task_named(name)
        assert task.domain in DOMAINS and task.dims and task.episode_steps and task.reference_returns, name
        assert return_scale(name) > 0 and d4rl_file(name), name


def test_a_simulator_is_a_module_and_an_entry_in_the_registry(monkeypatch):
    """No other file is touched for a task whose environments step together."""
    module = types.ModuleType("meeting")
    module.vector = lambda request: ToyAgentsVectorEnv(
        len(request.seeds), 1, act_steps=request.act_steps, seeds=request.seeds
    )
    monkeypatch.setitem(sys.modules, "diffusion_rl.envs.meeting", module)
    monkeypatch.setattr(registry, "TASKS", (*TASKS, registry.TaskSpec("meet", "meeting")))
    dims = {"obs_dim": 4, "action_dim": 2}
    venv = make_vector_env({"name": "meet-v0", "n_envs": 3}, **dims, act_steps=2, seed=5)
    assert venv.reset()["state"].shape == (3, 1, 4) and venv.act_steps == 2
    with pytest.raises(UserError, match="obs_dim=5 is wrong for meet-v0"):
        make_vector_env({"name": "meet-v0", "n_envs": 3}, **dims | {"obs_dim": 5}, act_steps=2, seed=5)
