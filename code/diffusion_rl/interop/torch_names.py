"""Names and layouts of the reference's state_dict for our modules: the bridge for weights, both ways.

A module's own variable path is rewritten by the rules below; kernels [..., in, out] are stored as [out, in, ...].
Modules that appear under two names (the base network of a fine-tuned policy is `network` and `actor`) appear twice, as
in PyTorch. An ensemble is one variable here; in the reference its members are modules of a list,
`target_networks.<m>.<name>`, except in `ensemble_params.<name>`, which are stacked as ours are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

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
    (r"(^|\.)(td?_emb|cond_embed)\.expand\.", r"\1\2.0."),
    (r"(^|\.)(td?_emb|cond_embed)\.project\.", r"\1\2.2."),
    (r"linear_attention\.", "fn.fn."),
    (r"inner_attention\.", "attn.fn."),
    (r"channel_norm\.", "fn.norm."),
    (r"(blocks\.\d+|final_conv\.0)\.conv\.", r"\1.block.0."),
    (r"(blocks\.\d+|final_conv\.0)\.norm\.", r"\1.block.2."),
    (r"mha\.in_proj\.", "mha.qkv_proj."),
    (r"attn\.in_proj\.kernel$", "attn.in_proj_weight"),
    (r"attn\.in_proj\.bias$", "attn.in_proj_bias"),
    (r"layers\.(\d+)\.linear\.", r"moduleList.\1.linear_1."),
    (r"layers\.(\d+)\.norm\.", r"moduleList.\1.norm_1."),
    (r"\.kernel$", ".weight"),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)


def torch_name(path: str) -> str:
    """Returns the reference's name of one of our variables."""
    for pattern, replacement in _RULES:
        path = re.sub(pattern, replacement, path)
    return path


class Parameter(NamedTuple):
    """A tensor of the reference's state_dict, and where it is in ours.

    Attributes:
        name: the reference's.
        variable: ours.
        transposed: the variable is a kernel [..., in, out], the tensor [out, in, ...].
        member: the tensor is this entry of a variable that is stacked [M, ...].
        stacked: variable and tensor are stacked both, [M, ...].
    """

    name: str
    variable: tf.Variable
    transposed: bool
    member: int | None = None
    stacked: bool = False

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """Returns the tensor for a value (or gradient) [...] of the variable: [out,in,...] for kernels [...,in,out]."""
        value = value if self.member is None else value[self.member]
        return np.ascontiguousarray(channels_first(value, int(self.stacked))) if self.transposed else value

    def assign(self, tensor: np.ndarray) -> None:
        """Gives the variable, or its entry, the value of a tensor ([out,in,...] for a kernel)."""
        value = channels_last(tensor, int(self.stacked)) if self.transposed else tensor
        target = self.variable if self.member is None else self.variable[self.member]
        target.assign(value.astype(self.variable.dtype.as_numpy_dtype))


def named_parameters(module: object) -> Iterator[Parameter]:
    """Yields every tensor of the reference's state_dict, aliases included."""
    for path, variable in named_variables(module):
        transposed = path.endswith(".kernel")
        owner, is_ensemble, rest = path.rpartition("members.")
        if is_ensemble and owner not in ("", "ensemble_params."):
            for m in range(variable.shape[0]):
                yield Parameter(torch_name(f"{owner}{m}.{rest}"), variable, transposed, member=m)
        else:
            yield Parameter(torch_name(owner + rest), variable, transposed, stacked=bool(is_ensemble))


def state_dict(module: object) -> dict[str, np.ndarray]:
    """Returns the weights of a module or policy under the reference's names and in its layouts."""
    return {p.name: p.to_torch(p.variable.numpy()) for p in named_parameters(module)}


def channels_first(value: np.ndarray, first: int = 0) -> np.ndarray:
    """Returns a kernel [..., in, out] as [out, in, ...], behind `first` axes that stay."""
    return np.moveaxis(value, (-1, -2), (first, first + 1))


def channels_last(value: np.ndarray, first: int = 0) -> np.ndarray:
    """Returns a kernel [out, in, ...] as [..., in, out], behind `first` axes that stay."""
    return np.moveaxis(value, (first, first + 1), (-1, -2))


def load_state_dict(module: object, weights: Mapping[str, np.ndarray], strict: bool = True) -> list[str]:
    """Gives a module the reference's weights.

    Args:
        strict: every name of the module must be there and none may be left over; otherwise what fits is loaded.

    Returns:
        the names that were loaded.

    Raises:
        UserError: a name is missing or left over (strict), or a shape differs.
    """
    expected = list(named_parameters(module))
    if strict:
        names = {p.name for p in expected}
        missing, left_over = sorted(names - set(weights)), sorted(set(weights) - names)
        if missing or left_over:
            raise UserError(
                f"these weights are not of this network: missing {_few(missing)}, left over {_few(left_over)}"
            )
    loaded = []
    for parameter in expected:
        if parameter.name not in weights:
            continue
        value = np.asarray(weights[parameter.name])
        needed = parameter.to_torch(np.empty(parameter.variable.shape, np.bool_)).shape
        if value.shape != needed:
            raise UserError(
                f"weight {parameter.name} has shape {value.shape}, this network needs {needed}: "
                "check obs_dim, action_dim, horizon_steps and the network's dims"
            )
        parameter.assign(value)
        loaded.append(parameter.name)
    return loaded


def _few(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
