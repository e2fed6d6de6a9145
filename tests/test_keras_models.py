"""Actors, critics and the planners' networks are Keras models: summaries, weights as arrays and as files, copies."""

import os

import numpy as np
import pytest
import tensorflow as tf
from tests import test_acting, test_policy_networks
from tests.test_policy_networks import OBS, TO, A, H

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import keras
from diffusion_rl.networks.critics import CriticEnsemble, CriticObs, CriticObsAct, DistributionalCritic
from diffusion_rl.networks.dit import ConditionalDiT
from diffusion_rl.networks.eta import EtaAction, EtaState
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.networks.iql import StateValue, TwinQ
from diffusion_rl.networks.latent import ActionVAE, DiffusionBackbone, LatentDenoiser, TrajectoryEncoder
from diffusion_rl.networks.layers import clone, variables_of
from diffusion_rl.networks.mlp import DiffusionMLP
from diffusion_rl.networks.stacking import MaskedTemporalUnet, StackClassifier
from diffusion_rl.networks.temporal_unet import ActionTemporalUnet, TemporalUnet, ValueFunction
from diffusion_rl.networks.vision import ViTCritic

NETWORKS = {
    **test_policy_networks.NETWORKS,
    **{name: build for name, build in test_acting.NETWORKS.items() if "vision" in name},
    "diffusion MLP": lambda: DiffusionMLP(A, H, OBS * TO, mlp_dims=[8, 8, 8], residual_style=True),
    "state value": lambda: CriticObs(OBS, [8, 8, 8], residual_style=True),
    "state value that sees": lambda: ViTCritic(mlp_dims=[8], **test_acting.eyes()),
    "action value": lambda: CriticObsAct(OBS, [8], A),
    "returns": lambda: DistributionalCritic(OBS, [8], A),
    "ensemble": lambda: CriticEnsemble([CriticObsAct(OBS, [8], A, double_q=False) for _ in range(3)]),
    "eta": lambda: EtaAction(A),
    "eta of the state": lambda: EtaState(OBS, [8]),
    "temporal U-Net": lambda: TemporalUnet(8, OBS + A, dim=8, dim_mults=(1, 2), attention=True),
    "U-Net of actions": lambda: ActionTemporalUnet(8, A, OBS, dim=8, dim_mults=(1, 2)),
    "U-Net of stacking": lambda: MaskedTemporalUnet(8, OBS + A, dim=8, dim_mults=(1, 2)),
    "value of a plan": lambda: ValueFunction(32, OBS + A, dim=8),
    "classifier": lambda: StackClassifier(OBS),
    "diffusion transformer": lambda: ConditionalDiT(OBS, 16, d_model=16, n_heads=2, depth=1),
    "inverse dynamics": lambda: InverseDynamics(OBS, A),
    "twin Q": lambda: TwinQ(OBS, A, 8),
    "V": lambda: StateValue(OBS, 8),
    "VAE": lambda: ActionVAE(A, 4, 8),
    "latent denoiser": lambda: LatentDenoiser(
        TrajectoryEncoder(A + OBS, 3, 8, 8, layers=1, heads=2), DiffusionBackbone(4, 8, 8, 1, 8), 2, 2
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_a_keras_model(name, tmp_path, capsys):
    one, other = NETWORKS[name](), NETWORKS[name]()
    assert isinstance(one, keras.Model)
    one.summary(expand_nested=True)
    printed, sizes = capsys.readouterr().out, [int(np.prod(v.shape)) for v in variables_of(one)]
    assert one.count_params() == sum(sizes) and "(unused)" not in printed
    assert f"Total params: {sum(sizes)}" in printed

    for i, variable in enumerate(variables_of(one)):
        variable.assign(tf.fill(variable.shape, tf.cast(1 + i, variable.dtype)))
    other.set_weights(one.get_weights())
    check_same(one, other)

    for file in ("x.weights.h5", "checkpoint/x"):
        one.save_weights(os.path.join(tmp_path, file))
        fresh = clone(NETWORKS[name]())
        fresh.load_weights(os.path.join(tmp_path, file))
        check_same(one, fresh)
    with pytest.raises(UserError, match="NAME.weights.h5"):
        one.save_weights(tmp_path / "x.h5")


def check_same(one, other):
    pairs = list(zip(variables_of(one), variables_of(other), strict=True))
    assert all(a is not b and np.array_equal(a, b) for a, b in pairs)


def test_a_copy_has_weights_and_files_of_its_own(tmp_path):
    one = NETWORKS["state value"]()
    copied = clone(one)
    check_same(one, copied)
    copied.set_weights([weight + 1 for weight in copied.get_weights()])
    copied.save_weights(tmp_path / "x")
    before = one.get_weights()
    copied.load_weights(tmp_path / "x")
    assert all(np.array_equal(a, b) for a, b in zip(before, one.get_weights(), strict=True))
    assert all(np.array_equal(a + 1, b) for a, b in zip(before, copied.get_weights(), strict=True))
