"""Replay of recordings of the PyTorch DiffuserLite: its classes and single calls; runs are in `diffuser_lite_runs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusion_rl.core.keras import floatx
from diffusion_rl.diffusion import rectified_flow
from diffusion_rl.networks import dit, iql
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.networks.layers import sinusoidal_embedding
from parity_tests.replay import diffuser
from parity_tests.replay.files import Outputs

_NETS, _UTILS = "cleandiffuser.nn_diffusion.", "cleandiffuser.utils."
CONDITION = "cleandiffuser.nn_condition.MLPCondition"


def dit1d(timestep_emb_type: str, **kwargs: Any) -> dit.DiT1d:
    assert timestep_emb_type == "fourier"
    return dit.DiT1d(**kwargs)


def inverse(out_activation: Any, optim_params: Any = None, add_dropout: bool = False, **kwargs: Any) -> InverseDynamics:
    return InverseDynamics(dropout=0.1 if add_dropout else 0.0, **kwargs)


def positions(dim: int) -> Callable[[Any], Any]:
    """Whole numbers, as the transformer gives them, have another table than fractions."""

    def embed(x: Any) -> Any:
        return dit.position_table(len(x), dim) if x.dtype.is_integer else sinusoidal_embedding(x, dim, floatx())

    return embed


def condition(obj: dit.ReturnCondition, given: dict[str, Any], draws: list[Any]) -> Outputs:
    """In training a given mask does not count: it is drawn."""
    return {"out": obj(given["condition"], obj.keep(draws[0]) if draws else given.get("mask"))}


def grid(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    start, end = (float(bound) for bound in given["trange"])
    return {"grid": rectified_flow.time_grid(int(given["sampling_steps"]), start=start, end=end)}


diffuser.MAKE |= {
    "torch.nn.Tanh": lambda: None,
    _NETS + "DiT1d": dit1d,
    _NETS + "dit.DiTBlock": dit.DiTBlock,
    _NETS + "dit.FinalLayer1d": dit.FinalLayer,
    _UTILS + "FourierEmbedding": dit.FourierEmbedding,
    _UTILS + "SinusoidalEmbedding": positions,
    CONDITION: dit.ReturnCondition,
    "cleandiffuser.invdynamic.FancyMlpInvDynamic": inverse,
    _UTILS + "iql.TwinQ": iql.TwinQ,
}
diffuser.CALLS |= {
    (_NETS + "DiT1d", "forward"): (diffuser.layer, 2),
    (CONDITION, "forward"): (condition, 1),
    (_UTILS + "iql.TwinQ", "forward"): (diffuser.layer, 2),
    (_UTILS + "utils.quad_sampling_step_schedule_continuous", "__target__"): (grid, 1),
}
for _name in (_NETS + "dit.DiTBlock", _NETS + "dit.FinalLayer1d", _UTILS + "FourierEmbedding"):
    diffuser.CALLS[_name, "forward"] = (diffuser.layer, 1)
diffuser.CALLS[_UTILS + "SinusoidalEmbedding", "forward"] = (diffuser.layer, 1)
