"""Names and layouts of the reference's state_dict for our modules: the bridge for weights, both ways.

A module's own variable path is rewritten by the rules below; kernels [..., in, out] are stored as [out, in, ...].
Modules that appear under two names (the base network of a fine-tuned policy is `network` and `actor`) appear twice, as
in PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.networks.layers import named_variables

# Applied in order to "path.of.variable"; the first group of each is kept.
_RULES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)vision\.", r"\1"),  # the reference's vision networks hold these parts themselves
    (r"patch_embed\.conv1\.", "patch_embed.embed.0."),
    (r"patch_embed\.norm\.", "patch_embed.embed.1."),
    (r"patch_embed\.conv2\.", "patch_embed.embed.3."),
    (r"input_linear\.", "input_proj.0."),
    (r"input_norm\.", "input_proj.1."),
    (r"compress\.linear\.", "compress.0."),
    (r"compress\.norm\.", "compress.1."),
    (r"time_(embedding|mlp)\.expand\.", r"time_\1.1."),
    (r"time_(embedding|mlp)\.project\.", r"time_\1.3."),
    (r"(blocks\.\d+|final_conv\.0)\.conv\.", r"\1.block.0."),
    (r"(blocks\.\d+|final_conv\.0)\.norm\.", r"\1.block.2."),
    (r"attn\.in_proj\.kernel$", "attn.in_proj_weight"),
    (r"attn\.in_proj\.bias$", "attn.in_proj_bias"),
    (r"layers\.(\d+)\.linear\.", r"moduleList.\1.linear_1."),
    (r"layers\.(\d+)\.norm\.", r"moduleList.\1.norm_1."),
    (r"\.kernel$", ".weight"),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)


def torch_name(path: str) -> str:
    """The reference's name of one of our variables."""
    for pattern, replacement in _RULES:
        path = re.sub(pattern, replacement, path)
    return path


def named_parameters(module: object) -> Iterator[tuple[str, tf.Variable, bool]]:
    """(reference name, variable, whether it is stored transposed) in the reference's order, aliases included."""
    for path, variable in named_variables(module):
        yield torch_name(path), variable, path.endswith(".kernel")


def state_dict(module: object) -> dict[str, np.ndarray]:
    """The weights of a module or policy under the reference's names and in its layouts."""
    return {n: to_torch(v.numpy(), transposed) for n, v, transposed in named_parameters(module)}


def unique_parameters(module: object) -> Iterator[tuple[str, tf.Variable, bool]]:
    """Like `named_parameters`, each variable once under its first name (`network.*`, not its alias `actor.*`)."""
    seen: set[int] = set()
    for name, variable, transposed in named_parameters(module):
        if id(variable) not in seen:
            seen.add(id(variable))
            yield name, variable, transposed


def to_torch(value: np.ndarray, transposed: bool) -> np.ndarray:
    """One array in the reference's layout."""
    return np.ascontiguousarray(channels_first(value)) if transposed else value


def channels_first(value: np.ndarray) -> np.ndarray:
    """A kernel [..., in, out] as [out, in, ...]."""
    return np.moveaxis(value, (-1, -2), (0, 1))


def channels_last(value: np.ndarray) -> np.ndarray:
    """A kernel [out, in, ...] as [..., in, out]."""
    return np.moveaxis(value, (0, 1), (-1, -2))


def load_state_dict(module: object, weights: Mapping[str, np.ndarray], strict: bool = True) -> list[str]:
    """Give a module the reference's weights.

    Args:
        strict: every name of the module must be there and none may be left over; otherwise what fits is loaded.

    Returns:
        the names that were loaded.

    Raises:
        UserError: a name is missing or left over (strict), or a shape differs.
    """
    expected = list(named_parameters(module))
    if strict:
        names = {n for n, _, _ in expected}
        missing, left_over = sorted(names - set(weights)), sorted(set(weights) - names)
        if missing or left_over:
            raise UserError(
                f"these weights are not of this network: missing {_few(missing)}, left over {_few(left_over)}"
            )
    loaded = []
    for name, variable, transposed in expected:
        if name not in weights:
            continue
        value = np.asarray(weights[name])
        needed = to_torch(np.empty(variable.shape, np.bool_), transposed).shape
        if value.shape != needed:
            raise UserError(
                f"weight {name} has shape {value.shape}, this network needs {needed}: "
                "check obs_dim, action_dim, horizon_steps and the network's dims"
            )
        value = channels_last(value) if transposed else value
        variable.assign(value.astype(variable.dtype.as_numpy_dtype))
        loaded.append(name)
    return loaded


def _few(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
