"""Rung 9: several replicas train as one does, up to rounding; recorded iterations of PyTorch are met by them, too.

One replica is the program without replicas (the other rungs). Here replicas are devices of one process; processes that
train together are in tests/test_replicas.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.core.places import REPOSITORY
from diffusion_rl.core.replicas import Replicas, averaged, used
from diffusion_rl.data.episodes import Episodes
from diffusion_rl.data.trajectories import TrajectoryDataset
from diffusion_rl.methods.diffuser.model import TrajectoryDiffusion
from diffusion_rl.methods.diffuser.trainer import DiffuserTrainer
from diffusion_rl.methods.diffuser_lite.levels import PlanLevel
from diffusion_rl.methods.diffuser_lite.trainer import InverseTrainer, LevelTrainer
from diffusion_rl.networks.dit import ConditionalDiT
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.temporal_unet import TemporalUnet
from parity_tests.replay.dispatch import replay
from parity_tests.replay.files import GOLDENS

QUICK = ["agent_ppo_diffusion_clipnorm_2itr", "agent_pretrain_diffusion", "agent_idql"]
OTHERS = [
    "agent_ppo_diffusion_base",
    "agent_ppo_exact",
    "agent_ppo_gaussian",
    "agent_update_flow",
    "agent_update_shortcut_repeat",
    "agent_sac",
]
CASES = [(case, 2) for case in QUICK]
CASES += [pytest.param(case, 4, marks=pytest.mark.slow) for case in QUICK + OTHERS]
CASES += [pytest.param(case, 2, marks=pytest.mark.slow) for case in OTHERS]
GATE = 1e-9


@pytest.mark.parametrize(("case", "n"), CASES)
def test_recorded_iterations(case, n):
    with used(Replicas(devices=["CPU:0"] * n)):
        replay(GOLDENS / f"{case}.npz")


@pytest.mark.parametrize("rows", [7, 2])  # 2: one of three replicas has nothing to do
def test_means_over_unequal_parts_and_what_is_not_there(rows):
    draws = NoiseSource(0)
    x, weights = (tf.constant(draws.normal(shape, np.float64)) for shape in ((rows, 3), (2 * rows, 2)))

    def means(x, w, nothing):
        assert nothing is None
        return {"x": tf.reduce_mean(x), "none": None}, [tf.reduce_mean(tf.square(w), axis=0)]

    one = means(x, weights, None)
    with used(Replicas(devices=["CPU:0"] * 3)):
        several = averaged(means, x, weights, None)
    assert several[0]["none"] is None
    np.testing.assert_allclose(several[0]["x"], one[0]["x"], rtol=GATE)
    np.testing.assert_allclose(several[1][0], one[1][0], rtol=GATE)


def diffuser() -> list[np.ndarray]:
    """Weights and losses after five steps of Diffuser."""
    draws, lengths = NoiseSource(3), np.array([9, 7])
    rows = lengths.sum()
    episodes = Episodes(draws.normal((rows, 3)), draws.uniform((rows, 2)), lengths, draws.normal((rows,)))
    data = TrajectoryDataset(episodes, 4, "GaussianNormalizer", max_path_length=20)
    model = TrajectoryDiffusion(TemporalUnet(4, 5, 3, dim=8, dim_mults=(1,)), 4, 3, 2, 5, loss_type="l2")
    trainer = DiffuserTrainer(model, data, 1e-3, 0.9)
    batches = [(draws.integers(0, 8, (6,)), draws.integers(0, 5, (6,)), draws.normal((6, 4, 5))) for _ in range(5)]
    losses, _ = trainer.steps(batches, 0)
    return [losses, *(v.numpy() for v in trainer.variables)]


def diffuser_lite() -> list[np.ndarray]:
    """Weights and losses after three steps of a level of DiffuserLite and of its inverse dynamics."""
    draws = NoiseSource(4)
    network = ConditionalDiT(3, emb_dim=16, d_model=16, n_heads=2, depth=1)
    for variable in variables_of(network):
        variable.assign_add(0.2 * draws.normal(variable.shape))
    level = LevelTrainer(PlanLevel(network, 5, 3, False), 1e-3, 0.9, max_norm=1.0)
    inverse = InverseTrainer(InverseDynamics(3, 2, 16))
    losses = []
    for _ in range(3):
        x0, x1 = (tf.constant(draws.normal((6, 5, 3)), tf.float64) for _ in range(2))
        t, returns = (tf.constant(draws.uniform(shape), tf.float64) for shape in ((6,), (6, 1)))
        keep = level.level.network.condition.keep(tf.constant(draws.uniform((6,)), tf.float64))
        losses += level.update(x0, x1, t, returns, keep, tf.constant(1e-3, tf.float64))
        valid = tf.constant(draws.integers(0, 2, (6, 4)), tf.float64)
        actions = tf.constant(draws.normal((6, 4, 2)), tf.float64)
        losses.append(inverse.update(x0[:, :-1], actions, x0[:, 1:], None, valid))
    return [np.stack(losses), *(v.numpy() for v in [*level.variables, *variables_of(inverse.inverse)])]


@pytest.mark.parametrize("train", [diffuser, diffuser_lite])
def test_planners(train: Callable[[], list[np.ndarray]]):
    results = []
    for n in (1, 2):
        with precision("float64"), initial_weights(NoiseSource(5)), used(Replicas(devices=["CPU:0"] * n)):
            results.append(train())
    for several in results[1:]:
        for one, other in zip(results[0], several, strict=True):
            np.testing.assert_allclose(other, one, rtol=GATE, atol=GATE)


def test_logical_devices():
    """Two logical processors of one process, as two GPUs would be: a recorded iteration again."""
    program = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from diffusion_rl.core import replicas
from parity_tests.replay.dispatch import replay
from parity_tests.replay.files import GOLDENS

places, plain = set(), replicas._weighted
def seen(*arguments):
    result, values = plain(*arguments)
    places.update(value.device[-5:] for value in values if hasattr(value, "device"))
    return result, values

replicas._weighted = seen
with replicas.used(replicas.Replicas(devices=replicas.devices(2))):
    replay(GOLDENS / "agent_ppo_gaussian.npz")
print(sorted(places))
"""
    paths = os.pathsep.join([str(REPOSITORY / "code"), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "['CPU:0', 'CPU:1']"
