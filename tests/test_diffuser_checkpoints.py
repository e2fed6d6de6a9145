"""Checkpoints of the PyTorch Diffuser: the weights of `state_<n>.pt`, and configurations read without running them."""

import os
import pickle
import sys
import types

import numpy as np
import pytest
from tests.test_diffuser import dataset

from diffusion_rl.core.errors import UserError
from diffusion_rl.interop import diffuser_checkpoint, torch_checkpoint
from diffusion_rl.interop.torch_names import state_dict
from diffusion_rl.methods.diffuser import files
from diffusion_rl.methods.diffuser.model import TrajectoryDiffusion
from diffusion_rl.networks.temporal_unet import TemporalUnet


@pytest.fixture
def original(monkeypatch):
    """Stand-ins for the original's classes, under its module names, to pickle configurations with."""
    classes = {}
    for module, names in {
        "diffuser.utils.config": ["Config"],
        "diffuser.models.temporal": ["TemporalUnet"],
        "diffuser.models.diffusion": ["GaussianDiffusion"],
        "diffuser.datasets.sequence": ["SequenceDataset"],
    }.items():
        found = types.ModuleType(module)
        for name in names:
            classes[name] = type(name, (), {"__module__": module})
            setattr(found, name, classes[name])
        monkeypatch.setitem(sys.modules, module, found)
    for parent in ("diffuser", "diffuser.utils", "diffuser.models", "diffuser.datasets"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))

    def write(path, name, **arguments):
        config = classes["Config"]()
        config.__dict__.update(_class=classes[name], _device="cuda", _dict=arguments)
        path.write_bytes(pickle.dumps(config))

    return write


def test_a_folder_of_the_original(tmp_path, original, monkeypatch):
    sizes = {"horizon": 4, "observation_dim": 3, "action_dim": 2}
    original(tmp_path / "dataset_config.pkl", "SequenceDataset", env="hopper-medium-v2", horizon=4,
             normalizer="GaussianNormalizer", preprocess_fns=[], use_padding=True, max_path_length=20)  # fmt: skip
    original(tmp_path / "model_config.pkl", "TemporalUnet", horizon=4, transition_dim=5, cond_dim=3, dim_mults=(1, 2),
             attention=False)  # fmt: skip
    original(tmp_path / "diffusion_config.pkl", "GaussianDiffusion", **sizes, n_timesteps=6, predict_epsilon=False)
    trained = TrajectoryDiffusion(TemporalUnet(4, 5, dim_mults=(1, 2)), **sizes, n_timesteps=6)
    weights = state_dict(trained) | {"betas": np.zeros(6, np.float32), "loss_fn.weights": np.ones((4, 5), np.float32)}
    torch_checkpoint.write_pt(tmp_path / "state_200.pt", {"step": 200, "model": weights, "ema": weights})
    for name in list(sys.modules):
        if name.split(".")[0] == "diffuser":
            monkeypatch.delitem(sys.modules, name)  # nothing of it can be imported while it is read
    data = dataset()
    monkeypatch.setattr(files, "find_episodes", lambda name, data_dir: None)
    monkeypatch.setattr(files, "dataset_of", lambda episodes, facts: data)
    experiment = files.load_experiment(tmp_path)
    assert experiment.epoch == 200 and experiment.model.n_timesteps == 6 and not experiment.model.predict_epsilon
    for name, value in state_dict(experiment.model).items():
        np.testing.assert_array_equal(value, weights[name])
    torch_checkpoint.write_pt(tmp_path / "state_300.pt", {"step": 300, "ema": weights | {"betas": np.zeros(9)}})
    with pytest.raises(UserError, match="a schedule of 9 steps"):
        files.load_experiment(tmp_path)


class Malicious:
    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


def test_nothing_in_a_configuration_runs(tmp_path):
    path = tmp_path / "model_config.pkl"
    for payload in (
        pickle.dumps(Malicious(tmp_path / "ran")),
        pickle.dumps([1, 2]),
        b"\x80\x04X",
        b"",
        b"\x80\x04\x8c\x01a.",
    ):
        path.write_bytes(payload)
        with pytest.raises(UserError, match="nothing in it was executed"):
            diffuser_checkpoint.read_config(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="must lie beside"):
        diffuser_checkpoint.read_config(tmp_path / "absent_config.pkl")


def test_only_plain_arguments(tmp_path, original):
    original(tmp_path / "model_config.pkl", "TemporalUnet", horizon=4, dim_mults=(1, 2), weights={0: 2.0})
    name, arguments = diffuser_checkpoint.read_config(tmp_path / "model_config.pkl")
    assert name == "diffuser.models.temporal.TemporalUnet"
    assert arguments == {"horizon": 4, "dim_mults": [1, 2], "weights": {"0": 2.0}}
    original(tmp_path / "model_config.pkl", "TemporalUnet", horizon=np.int64(4))
    with pytest.raises(UserError, match="refused"):
        diffuser_checkpoint.read_config(tmp_path / "model_config.pkl")
