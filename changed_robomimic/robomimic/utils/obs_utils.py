"""Which observations are what, and how each kind is brought into a network's form and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Filled by `initialize_obs_modality_mapping_from_dict`.
OBS_MODALITIES_TO_KEYS: dict[str, list[str]] = {}
OBS_KEYS_TO_MODALITIES: dict[str, str] = {}

MODALITIES = ("low_dim", "rgb", "depth", "scan")


def initialize_obs_modality_mapping_from_dict(modality_mapping: Mapping[str, Sequence[str]]) -> None:
    """Say which observation keys belong to which modality: {"low_dim": [...], "rgb": [...]}. Forgets what was before.

    Raises ValueError for an unknown modality and for a key in two of them.
    """
    OBS_MODALITIES_TO_KEYS.clear()
    OBS_KEYS_TO_MODALITIES.clear()
    for modality, keys in modality_mapping.items():
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r} is unknown: choose among {', '.join(MODALITIES)}")
        OBS_MODALITIES_TO_KEYS[modality] = list(keys)
        for key in keys:
            if OBS_KEYS_TO_MODALITIES.setdefault(key, modality) != modality:
                raise ValueError(f"{key} is in the modalities {OBS_KEYS_TO_MODALITIES[key]} and {modality}")


def key_is_obs_modality(key: str, obs_modality: str) -> bool:
    """Whether `key` was said to belong to `obs_modality`. Raises KeyError for a key that was not mentioned."""
    if key not in OBS_KEYS_TO_MODALITIES:
        raise KeyError(f"observation {key!r} has no modality: initialize_obs_modality_mapping_from_dict names the keys")
    return OBS_KEYS_TO_MODALITIES[key] == obs_modality


def process_frame(frame: np.ndarray, channel_dim: int, scale: float | None) -> np.ndarray:
    """Images [..., Hi, Wi, C] of numbers up to `scale` -> [..., C, Hi, Wi] float32 in [0, 1]."""
    if frame.shape[-1] != channel_dim:
        raise ValueError(f"an image of shape {frame.shape} has not {channel_dim} channels in its last axis")
    frame = frame.astype(np.float32)
    if scale is not None:
        frame = np.clip(frame / np.float32(scale), 0.0, 1.0)
    return np.moveaxis(frame, -1, -3)


def unprocess_frame(frame: np.ndarray, channel_dim: int, scale: float | None) -> np.ndarray:
    """The inverse of `process_frame`."""
    if frame.shape[-3] != channel_dim:
        raise ValueError(f"an image of shape {frame.shape} has not {channel_dim} channels in its third last axis")
    frame = np.moveaxis(frame, -3, -1)
    return frame if scale is None else frame * scale


#: channels, largest value
_FRAMES: dict[str, tuple[int, float | None]] = {"rgb": (3, 255.0), "depth": (1, None)}


def _modality(obs_modality: str | None, obs_key: str | None) -> str:
    if (obs_modality is None) == (obs_key is None):
        raise ValueError("give either obs_modality or obs_key")
    if obs_modality is not None:
        return obs_modality
    key_is_obs_modality(str(obs_key), "")  # raises for an unknown key
    return OBS_KEYS_TO_MODALITIES[str(obs_key)]


def process_obs(obs: np.ndarray, obs_modality: str | None = None, obs_key: str | None = None) -> np.ndarray:
    """One observation in a network's form: images channels first in [0, 1], anything else as it is."""
    modality = _modality(obs_modality, obs_key)
    return process_frame(obs, *_FRAMES[modality]) if modality in _FRAMES else obs


def unprocess_obs(obs: np.ndarray, obs_modality: str | None = None, obs_key: str | None = None) -> np.ndarray:
    """The inverse of `process_obs`: colours as uint8, rounded."""
    modality = _modality(obs_modality, obs_key)
    if modality not in _FRAMES:
        return obs
    frame = unprocess_frame(obs, *_FRAMES[modality])
    return np.rint(frame).astype(np.uint8) if modality == "rgb" else frame


def process_obs_dict(obs_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`process_obs` of every entry."""
    return {key: process_obs(value, obs_key=key) for key, value in obs_dict.items()}


def unprocess_obs_dict(obs_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`unprocess_obs` of every entry."""
    return {key: unprocess_obs(value, obs_key=key) for key, value in obs_dict.items()}
