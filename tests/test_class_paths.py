"""Class paths of earlier versions go on working: in users' files, in run folders, and in the policies that ship."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.config.targets import CHECKPOINT_CLASSES, modernize
from diffusion_rl.core.moved import MODULES
from diffusion_rl.export import saved
from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint

#: Every class that a file below cfg/ ever named, module by module.
EVER = {
    "algorithms.awr": ["AWR"],
    "algorithms.calql": ["CalQL"],
    "algorithms.dacer": ["DACER"],
    "algorithms.dipo": ["DIPO"],
    "algorithms.dpoer": ["DPOER"],
    "algorithms.dppo": ["DPPO"],
    "algorithms.dppo_exact": ["ExactDPPO"],
    "algorithms.dql": ["DQL"],
    "algorithms.gaussian_ppo": ["GaussianPPO"],
    "algorithms.gmm_ppo": ["GMMPPO"],
    "algorithms.ibrl": ["IBRL"],
    "algorithms.idql": ["IDQL"],
    "algorithms.qsm": ["QSM"],
    "algorithms.rlpd": ["RLPD"],
    "algorithms.rwr": ["RWR"],
    "algorithms.sac": ["SAC"],
    "data.sequences": ["QLearningDataset", "SequenceDataset"],
    "diffusion.exact_likelihood": ["VPSDE"],
    "loops.evaluation": ["Evaluation"],
    "loops.off_policy": ["OffPolicyTraining"],
    "loops.offline": ["PreTraining"],
    "loops.on_policy": ["OnPolicyTraining"],
    "networks.critics": ["CriticObs", "CriticObsAct", "DistributionalCritic"],
    "networks.eta": ["EtaFixed"],
    "networks.gaussian": ["GaussianMLP"],
    "networks.gmm": ["GMMMLP"],
    "networks.mlp": ["DiffusionMLP"],
    "networks.transformer": ["GMMTransformer", "GaussianTransformer"],
    "networks.unet1d": ["Unet1D"],
    "networks.vision": ["GaussianVisionMLP", "ViTCritic", "VisionDiffusionMLP"],
    "networks.vision_unet1d": ["VisionUnet1D"],
    "networks.vit": ["VitEncoder"],
    "policies.diffusion": ["DiffusionPolicy", "FineTunedDiffusionPolicy"],
    "policies.gaussian": ["GaussianPolicy"],
    "policies.gmm": ["GMMPolicy"],
}
SHIPPED = sorted((REPOSITORY / "data").rglob("pre_*.safetensors"))


@pytest.mark.parametrize("path", [f"diffusion_rl.{module}.{name}" for module, names in EVER.items() for name in names])
def test_every_class_path_that_was_ever_in_a_configuration(path: str) -> None:
    config = {"model": [{"_target_": path}]}
    modernize(config)
    module, _, name = config["model"][0]["_target_"].rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_what_a_checkpoint_may_name_exists() -> None:
    for path in CHECKPOINT_CLASSES:
        module, _, name = path.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), type)


def test_modules_are_found_under_their_earlier_names() -> None:
    for earlier, today in MODULES.items():
        module = importlib.import_module(f"diffusion_rl.{today}")
        assert importlib.import_module(f"diffusion_rl.{earlier}") is module
        assert module.__name__ == f"diffusion_rl.{today}" == module.__spec__.name
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("diffusion_rl.loops.nothing")


def test_other_names_stay_as_they_are() -> None:
    config = {"a": {"_target_": "own.algorithms.dppo.DPPO"}, "b": [{"_target_": 3}], "c": "diffusion_rl.loops.offline"}
    before = {"a": dict(config["a"]), "b": [dict(config["b"][0])], "c": config["c"]}
    modernize(config)
    assert config == before


def test_a_checkpoint_of_an_earlier_version_names_the_classes_of_today(tmp_path: Path) -> None:
    path = tmp_path / "state_0.safetensors"
    earlier = {"model": {"_target_": "diffusion_rl.algorithms.dppo.DPPO"}, "name": "x"}
    save_checkpoint(path, {"model.w": np.zeros(2, np.float32)}, {"kind": "dppo", "config": earlier})
    config = load_checkpoint(path).metadata["config"]
    assert config == {"model": {"_target_": "diffusion_rl.methods.on_policy.dppo.DPPO"}, "name": "x"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(REPOSITORY / "data").with_suffix("")))
def test_every_shipped_policy_loads(path: Path) -> None:
    assert len(SHIPPED) >= 15
    policy = saved.open_policy(path)
    assert policy is not None
