"""Facts of the wrong kind in a checkpoint whose checksum is right: read, or refused in one line, wherever it goes."""

import copy
import itertools

import numpy as np
import pytest
from omegaconf import OmegaConf
from tests.small_runs import EVALUATE, PRE_TRAIN, config, make_base_policy

from diffusion_rl.config.instantiate import instantiate
from diffusion_rl.core.errors import UserError
from diffusion_rl.export.saved import open_policy
from diffusion_rl.training.checkpoint import SCALE, in_eight_bits, load_checkpoint, save_checkpoint
from diffusion_rl.training.continuation import FINE_TUNING_MAY_CHANGE, compare_settings
from diffusion_rl.training.evaluation import fine_tuned_steps, model_of
from diffusion_rl.training.policy_files import load_policy
from diffusion_rl.training.run_facts import compare_policy

WRONG = (None, -1, 1e300, float("nan"), "x", [1], {"a": 1}, [[[]]])
PLACES = (
    *("kind", "normalization", "config", "sampling", "ft_denoising_steps", "denoising_steps", "obs_dim", "train"),
    *("normalization.obs_min", "config.env", "config.model", "config.train", "config.act_steps", "config.obs_dim"),
    *("config.model.network", "config.model.network._target_", "config.model.network.mlp_dims"),
    *("config.model.network.activation_type", "config.model.denoising_steps", "sampling.denoised_clip_value"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with all its facts."""
    folder = tmp_path_factory.mktemp("facts")
    checkpoint = load_checkpoint(make_base_policy(folder / "base.safetensors"))
    bounds = {"obs_min": [-1.0] * 11, "obs_max": [1.0] * 11, "action_min": [-1.0] * 3, "action_max": [1.0] * 3}
    facts = OmegaConf.to_container(config(PRE_TRAIN, folder), resolve=True)
    checkpoint.metadata |= {"normalization": bounds, "config": facts | {"act_steps": 4}, "train": {}}
    checkpoint.metadata.pop("format", None)
    return checkpoint


@pytest.mark.parametrize("where", PLACES)
def test_facts_of_the_wrong_kind(whole, where, tmp_path):
    cfg, path = config(EVALUATE, tmp_path), tmp_path / "x.safetensors"

    def evaluate():
        checkpoint = load_checkpoint(path)
        compare_policy(checkpoint, cfg, path, evaluating=True)
        policy = instantiate(model_of(checkpoint, cfg["model"]))
        policy.ft_denoising_steps = fine_tuned_steps(checkpoint, 0, path)
        load_policy(policy, checkpoint, path)

    def resume():
        compare_settings(load_checkpoint(path), OmegaConf.to_container(cfg), path, FINE_TUNING_MAY_CHANGE)

    for value, use in itertools.product(WRONG, (evaluate, resume, lambda: open_policy(path))):
        metadata = copy.deepcopy(whole.metadata)
        *parents, last = where.split(".")
        node = metadata
        for parent in parents:
            node = node[parent]
        node[last] = value
        save_checkpoint(path, whole.tensors, metadata)
        try:
            use()
        except UserError as error:
            assert len(str(error)) < 1000, error  # any other error fails the test


def test_a_compact_policy_has_eight_bits_and_loads_close_to_its_weights(tmp_path, whole):
    """Each matrix within half a step of its rows; a scale that does not fit is refused."""
    weights = {name: value for name, value in whole.tensors.items() if name.startswith("ema.")}
    compact = in_eight_bits(weights)
    save_checkpoint(tmp_path / "compact.safetensors", compact, whole.metadata)
    loaded = load_checkpoint(tmp_path / "compact.safetensors").tensors
    assert list(loaded) == list(weights)
    for name, value in weights.items():
        largest = np.abs(value).reshape(len(value), -1).max(axis=1) if value.ndim > 1 else np.abs(value)
        step = (largest / 127 if value.ndim > 1 else largest / 1024).reshape(-1, *[1] * (value.ndim - 1))
        assert loaded[name].dtype in (np.float16, np.float32) and (np.abs(loaded[name] - value) <= 0.5001 * step).all()
    scale = next(name for name in compact if name.endswith(SCALE))
    save_checkpoint(tmp_path / "wrong.safetensors", compact | {scale: compact[scale][:-1]}, whole.metadata)
    with pytest.raises(UserError, match="not one for each of its rows"):
        load_checkpoint(tmp_path / "wrong.safetensors")
    lonely = {name: value for name, value in compact.items() if name != scale.removesuffix(SCALE)}
    save_checkpoint(tmp_path / "lonely.safetensors", lonely, whole.metadata)
    with pytest.raises(UserError, match="belongs to no tensor of 8 bits"):
        load_checkpoint(tmp_path / "lonely.safetensors")
