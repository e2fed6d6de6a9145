"""Weights of policies from checkpoint files, ours or the reference's."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.config.compose import Config, compose_job, plain_copy, prepare, shipped_configs
from diffusion_rl.config.instantiate import default_arguments, flatten, instantiate
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.data.assets import resolve
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.networks.layers import copy_weights
from diffusion_rl.policies.diffusion import DiffusionPolicy, FineTunedDiffusionPolicy
from diffusion_rl.policies.flow import FlowPolicy, ShortcutFlowPolicy
from diffusion_rl.policies.gaussian import FineTunedGaussianPolicy, GaussianPolicy
from diffusion_rl.policies.gmm import GMMPolicy
from diffusion_rl.training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, require_finite
from diffusion_rl.training.continuation import program
from diffusion_rl.training.run_facts import compare_policy

log = logging.getLogger(__name__)

# Constructor arguments that decide, beside the weights, which action a policy takes.
SAMPLING = (
    "denoised_clip_value",
    "randn_clip_value",
    "final_action_clip_value",
    "eps_clip_value",
    "predict_epsilon",
    "use_ddim",
    "ddim_discretize",
    "ddim_steps",
)
GAUSSIAN_SAMPLING = ("randn_clip_value", "tanh_output")

#: Kinds of pre-trained policies: that act with their last weights, and with the averaged ones.
ACTS_WITH_LAST = (GaussianPolicy.KIND, GMMPolicy.KIND)
PRETRAINED = (*ACTS_WITH_LAST, DiffusionPolicy.KIND, FlowPolicy.KIND, ShortcutFlowPolicy.KIND)

#: Keys of a configuration that are a policy's own.
SHAPE = ("env_name", "obs_dim", "action_dim", "horizon_steps", "act_steps", "cond_steps", "denoising_steps")

Policy = DiffusionPolicy | FlowPolicy | GaussianPolicy | GMMPolicy


def find_checkpoint(path: str | Path, what: str = "base_policy_path") -> Path:
    """Returns the file of a checkpoint: of a run folder its newest one, else the file, fetched if need be.

    Raises UserError naming the cure: there is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return resolve(str(path))
    newest = latest_checkpoint(folder / "checkpoint") or latest_checkpoint(folder)
    if newest is None:
        raise UserError(f"{what}={path}: no checkpoint in this folder; give a run folder or a checkpoint")
    log.info("%s: %s", what, newest)
    return newest


def open_checkpoint(path: str | Path | None, what: str = "base_policy_path") -> Checkpoint:
    """Loads the checkpoint that the configuration names, of a run folder its newest one.

    Raises UserError naming the cure: there is none.
    """
    if not path:
        raise UserError(f"{what} is not set: give the path of a checkpoint (.safetensors, or the reference's .pt)")
    return load_checkpoint(find_checkpoint(path, what))


def build_policy(cfg: Config, seed: int, what: str = "base_policy_path") -> Any:
    """Builds the policy of a configuration, with new weights or those of `model.network_path`.

    what: the setting that names the file, for messages.

    Raises:
        UserError: there is no such file, or it was trained with another network.
    """
    with initial_weights(NoiseSource(seed)):
        policy = instantiate(cfg["model"])
    path = cfg["model"].get("network_path")
    if path:
        checkpoint = open_checkpoint(path, what)
        compare_policy(checkpoint, cfg, path, evaluating=False)
        load_policy(policy, checkpoint, path)
    return policy


def policy_weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Returns the weights to act with: the averaged ones of a pre-trained diffusion policy, else the model's.

    (The reference takes the last weights, not the average, of pre-trained Gaussian and mixture policies.)
    """
    last = checkpoint.metadata.get("kind") in ACTS_WITH_LAST
    first, second = ("model.", "ema.") if last else ("ema.", "model.")
    return checkpoint.select(first) or checkpoint.select(second)


def evaluation_of(settings: Mapping[str, Any], run: Path) -> str:
    """Returns the command that evaluates the policy of a run with a configuration that ships; empty: none fits it."""
    flat, network = flatten(settings), _network_of(settings.get("model"))
    place, scales = flat.get("env.name"), flat.get("normalization_path")
    where = f"{flat.get('env_name')} {scales} {flat.get('train_dataset_path')}"
    own_env = ":" in str(place)
    keys = [*SHAPE, "env.name", "normalization_path"] if own_env else SHAPE
    names = [name for name in shipped_configs() if name.startswith(f"{flat.get('suite')}/eval/")]
    of_task = [name for name in names if name.split("/")[2].removesuffix("-v2") in where]
    for name in of_task if of_task or not network else names:
        with contextlib.suppress(UserError):
            config = plain_copy(prepare(compose_job(name)))
            usual = flatten(config)
            own = [f"{key}={flat[key]}" for key in keys if key in usual and flat.get(key, usual[key]) != usual[key]]
            config = plain_copy(prepare(compose_job(name, own))) if own else config
            alike = _network_of(config["model"]) == network and place in (None, config["env"]["name"])
            if alike and scales in (None, config.get("normalization_path")):
                folder, _, file = name.rpartition("/")
                path = f"'{run}'" if re.search(r"[^\w./-]", str(run)) else run
                asked = [f"--config-name={file}", f"--config-dir=cfg/{folder}", f"base_policy_path={path}", *own]
                return program("script/run.py", *asked)
    return ""


def _network_of(model: Any) -> dict[str, Any]:
    """Returns the settings of the network that acts, its defaults included; nothing where none is described."""
    names = ("actor", "network", "policy")
    network = next((model[name] for name in names if model.get(name)), None) if isinstance(model, Mapping) else None
    return {**default_arguments(network["_target_"]), **network} if isinstance(network, Mapping) else {}


def is_fine_tuned(weights: dict[str, np.ndarray]) -> bool:
    """Returns whether these are weights of a fine-tuned policy."""
    return any(name.startswith("actor_ft.") for name in weights)


def load_policy(policy: Policy, checkpoint: Checkpoint, path: Any) -> None:
    """Fills a policy from a pre-trained or fine-tuned checkpoint.

    A pre-trained one fills the base network and its fine-tuned copy; critic and eta stay as they are. A fine-tuned
    diffusion policy fills everything it holds; of other policies the network is taken, and training starts from it.

    Raises:
        UserError: names the file, what differs, and what to set.
    """
    for key in ("obs_dim", "action_dim", "horizon_steps", "denoising_steps"):
        known, ours = checkpoint.metadata.get(key), getattr(policy, key, None)
        if known is not None and ours is not None and int(known) != int(ours):
            raise UserError(f"{path} was trained with {key}={known}, this run has {ours}: set {key}={known}")
    require_finite(policy_weights(checkpoint), path)
    try:
        _fill(policy, checkpoint, path)
    except UserError as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from error


def _fill(policy: Policy, checkpoint: Checkpoint, path: Any) -> None:
    weights = policy_weights(checkpoint)
    if hasattr(policy, "take_weights"):
        policy.take_weights(weights, load_state_dict)
        return
    if getattr(policy, "CONTINUES", False):  # the same algorithm's earlier training: critics and all
        load_state_dict(policy, weights)
        return
    network = {k.removeprefix("network."): v for k, v in weights.items() if k.startswith("network.")}
    if not isinstance(policy, FineTunedDiffusionPolicy):
        own = state_dict(policy.network)
        if "logvar" in own:  # a spread that was fixed in pre-training and is learned from here on
            network = {"logvar": own["logvar"], **network}
        for module in (policy.network, *getattr(policy, "copies", ())):
            load_state_dict(module, network)
        if isinstance(policy, FineTunedGaussianPolicy):
            copy_weights(policy.network, policy.actor)
        return
    network = network or {k.removeprefix("actor."): v for k, v in weights.items() if k.startswith("actor.")}
    if not network:
        raise UserError(f"{path} holds no diffusion policy (no network.* or actor.* weights)")
    load_state_dict(policy.network, network)
    base = {k.removeprefix("actor."): v for k, v in weights.items() if k.startswith("actor.")}
    load_state_dict(policy.actor, base or network)
    tuned = {k.removeprefix("actor_ft."): v for k, v in weights.items() if k.startswith("actor_ft.")}
    load_state_dict(policy.actor_ft, tuned or base or network)
    for part in ("critic", "eta"):
        module = getattr(policy, part, None)
        values = {k.removeprefix(part + "."): v for k, v in weights.items() if k.startswith(part + ".")}
        if module is not None and values:
            load_state_dict(module, values)


def policy_facts(policy: Policy) -> dict[str, Any]:
    """Returns what a checkpoint says of its policy, beside the configuration."""
    if not isinstance(policy, DiffusionPolicy):
        network, names = policy.network, getattr(policy, "SAMPLING", GAUSSIAN_SAMPLING)
        sampling = {name: getattr(policy, name) for name in names if hasattr(policy, name)}
        return {"action_dim": network.action_dim, "horizon_steps": policy.horizon_steps, "sampling": sampling}
    return {
        "denoising_steps": policy.denoising_steps,
        "ft_denoising_steps": getattr(policy, "ft_denoising_steps", 0),
        "obs_dim": policy.obs_dim,
        "action_dim": policy.action_dim,
        "horizon_steps": policy.horizon_steps,
        "sampling": {name: getattr(policy, name) for name in SAMPLING},
    }
