"""`import diffusion_rl` in a program of one's own: policies, environments, trainings, data sets."""

import re
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import tensorflow as tf
from tests.small_runs import FINE_TUNE, SMALL
from tests.test_sources import minari_file

import diffusion_rl
from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource

HOPPER = "gym/hopper-medium-v2/pre_diffusion_mlp"


@pytest.fixture(scope="module")
def policy():
    return diffusion_rl.load_policy(HOPPER)


def test_importing_costs_no_tensorflow():
    code = "import sys, diffusion_rl as d; assert 'tensorflow' not in sys.modules; assert set(d.__all__) <= set(dir(d))"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no_such_name"):
        diffusion_rl.no_such_name  # noqa: B018


def test_a_policy_acts_alone_and_in_batches(policy):
    """Equal noise gives equal actions, whatever way the observation is given; sessions execute whole chunks."""
    one = np.linspace(-0.5, 1.2, 11)
    rows = np.stack([one, -one])[:, None]
    chunk = policy.act(one, rng=3)
    assert chunk.shape == (policy.act_steps, 3) and np.abs(chunk).max() <= 1
    np.testing.assert_array_equal(policy.act(one[None], rng=3), chunk)
    np.testing.assert_array_equal(policy.act({"state": one[None]}, rng=NoiseSource(3)), chunk)
    assert policy.act(rows, rng=3).shape == (2, policy.act_steps, 3)
    assert policy.plan(rows, rng=3).shape == (2, policy.horizon_steps, 3)
    assert np.abs(policy.act(one) - policy.act(one)).max() > 0, "fresh noise, where none is given"
    session, rng = policy.session(3), NoiseSource(3)
    expected = np.concatenate([policy.act(one, rng), policy.act(-one, rng)])
    np.testing.assert_array_equal([session.act(one)] + [session.act(-one) for _ in range(7)], expected)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(12), r"state of the observation has shape \[12\], needed is \[1, 11\]"),
        ({"rgb": np.zeros(3)}, "the observation has rgb; needed: state"),
        (np.zeros((2, 2, 11)), r"needed is \[1, 11\], or \[B, 1, 11\]"),
    ],
)
def test_an_observation_that_does_not_fit(policy, observation, message):
    with pytest.raises(UserError, match=message):
        policy.act(observation)


def test_what_is_sampled_has_a_density(policy):
    """That of the chain is the sum over its steps of the Gaussians that they were drawn from, floored."""
    rows = np.zeros((3, 1, 11), np.float32)
    plan, chain = policy.sample(rows, rng=0, return_chain=True)
    steps = policy.policy.sampling_steps
    assert plan.shape == (3, policy.horizon_steps, 3) and chain.shape == (3, steps + 1, policy.horizon_steps, 3)
    np.testing.assert_allclose(policy.normalizer.unnormalize_action(chain[:, -1]), plan, atol=1e-6)
    density = policy.log_prob(rows, chain)
    assert density.shape == (3,) and np.isfinite(density).all()
    alone = policy.log_prob(rows[0], chain[0])
    assert alone.shape == () and alone == pytest.approx(density[0], rel=1e-4)
    assert (policy.log_prob(rows, chain + 0.1 * np.arange(steps + 1)[:, None, None]) < density).all()
    with pytest.raises(UserError, match="the chain has shape"):
        policy.log_prob(rows, plan)


@pytest.mark.slow
def test_an_exported_policy_is_the_loaded_one(policy, tmp_path):
    """Up to the rounding of the program that is written."""
    written = diffusion_rl.export_policy(policy, tmp_path / "hopper")
    assert written.path == tmp_path / "hopper"
    observation, noise = np.full((1, 1, 11), 0.3, np.float32), NoiseSource(5).normal(policy.policy.noise_shape(1))
    run = tf.saved_model.load(str(written.path)).signatures["with_noise"]
    exported = run(state=tf.constant(observation), noise=tf.constant(noise))["actions"].numpy()
    np.testing.assert_allclose(policy.act(observation, NoiseSource(5)), exported, atol=1e-5)


def test_a_policy_is_evaluated_in_a_task_and_in_an_own_environment(policy):
    few = diffusion_rl.evaluate(policy, "hopper-medium-v2", 2, seed=1)
    again = diffusion_rl.evaluate(HOPPER, "hopper-medium-v2", 2, seed=1)
    np.testing.assert_array_equal(few.returns, again.returns)
    assert (few.returns > 300).all() and few.successes is None and few.mean_return == few.returns.mean()
    own = gymnasium.wrappers.TimeLimit(gymnasium.make("Hopper-v5"), 60)
    alone = diffusion_rl.evaluate(policy, own, 2)
    assert (alone.steps <= 60).all() and alone.returns.shape == (2,)
    with pytest.raises(UserError, match=r"no task .* 'hoper-medium'.*hopper-medium"):
        diffusion_rl.make_env("hoper-medium")


def test_environments_are_in_raw_units():
    env = diffusion_rl.make_env("hopper-medium-v2", 2, act_steps=1)
    state = env.reset([{"seed": 0}, {"seed": 1}])["state"]
    assert state.shape == (2, 1, 11) and 1.2 < state[0, 0, 0] < 1.3, "the height of the torso in metres"
    env.close()


def test_the_readme_s_example_runs(tmp_path, monkeypatch, capsys):
    text = (REPOSITORY / "README.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_policy" in block)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3 and (tmp_path / "my_data" / "train.npz").is_file()


def test_a_training_says_what_it_does(tmp_path):
    rows = []
    overrides = [*SMALL[FINE_TUNE], "base_policy_path=null", "train.n_train_itr=2", f"logdir={tmp_path / 'run'}"]
    folder = diffusion_rl.train(FINE_TUNE, overrides, on_row=rows.append)
    assert folder == tmp_path / "run" and [row["itr"] for row in rows] == [0, 1]
    trained = diffusion_rl.load_policy(folder)
    assert trained.path.parent == folder / "checkpoint" and trained.act(np.zeros(11), 0).shape == (4, 3)
    with pytest.raises(UserError, match="itr"):
        diffusion_rl.train(FINE_TUNE, ["train.n_train_it=2"])


def test_raw_episodes_are_written_and_read(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [
        {"states": rng.normal(5, 2, (n, 3)), "actions": rng.uniform(-2, 2, (n, 2)), "rewards": rng.normal(size=n)}
        for n in (4, 7, 5, 9)
    ]
    files = diffusion_rl.write_dataset(episodes, tmp_path, val_split=0.25)
    assert sorted(path.name for path in files) == ["normalization.npz", "train.npz", "val.npz"]
    data = diffusion_rl.load_dataset(tmp_path)
    assert len(data.traj_lengths) == 3 and data.states.shape[1] == 3
    known = np.concatenate([one["states"] for one in episodes])
    assert all(np.abs(known - row).max(axis=1).min() < 1e-5 for row in data.states)
    diffusion_rl.write_dataset(data, tmp_path / "again")
    np.testing.assert_allclose(diffusion_rl.load_dataset(tmp_path / "again").states, data.states, atol=1e-5)
    episodes[1]["states"][2, 1] = np.nan
    with pytest.raises(UserError, match="episodes"):
        diffusion_rl.write_dataset(episodes, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert len(diffusion_rl.load_dataset("gym/hopper-medium-v2").traj_lengths) > 10


def test_a_minari_data_set_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(UserError, match="minari download mujoco/hopper/expert-v0"):
        diffusion_rl.load_dataset("mujoco/hopper/expert-v0")
    minari_file(tmp_path / "mujoco" / "hopper" / "expert-v0")
    assert diffusion_rl.load_dataset("mujoco/hopper/expert-v0").traj_lengths.tolist() == [3] * 11
