"""Replay of recordings of the PyTorch Diffuser (jannerm/diffuser): from its classes, weights and calls to ours."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx, precision
from diffusion_rl.diffusion.inpainting import apply_conditions
from diffusion_rl.diffusion.schedules import cosine_betas
from diffusion_rl.methods.diffuser.model import TrajectoryDiffusion, ValueDiffusion
from diffusion_rl.networks import temporal_unet, unet1d
from diffusion_rl.networks.convolution import plain_convolutions
from diffusion_rl.networks.layers import sinusoidal_embedding
from parity_tests.replay import build as builder
from parity_tests.replay import case
from parity_tests.replay.calls import caster
from parity_tests.replay.compare import Comparison, Mismatch, own_rounding
from parity_tests.replay.files import Cast, Golden, Outputs

# The schedule tables of the PyTorch Diffuser, which are part of its state_dict, and ours.
SCHEDULE_BUFFERS = {
    "betas": "betas",
    "alphas_cumprod": "alphas_cumprod",
    "alphas_cumprod_prev": "alphas_cumprod_prev",
    "sqrt_alphas_cumprod": "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod": "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod": "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod": "sqrt_recipm1_alphas_cumprod",
    "posterior_variance": "ddpm_var",
    "posterior_log_variance_clipped": "ddpm_logvar_clipped",
    "posterior_mean_coef1": "ddpm_mu_coef1",
    "posterior_mean_coef2": "ddpm_mu_coef2",
}

PACKAGES = ("diffuser.", "cleandiffuser.")  # the second is DiffuserLite's: replay/diffuser_lite.py adds its classes
PRECISIONS = (("float32", ""), ("float64", "64"))


def recognises(golden: Golden) -> bool:
    """Whether the recorded classes are Diffuser's or DiffuserLite's."""
    return any(path.startswith(PACKAGES) for path in golden.classes())


# ---------- objects ----------


class ChannelsFirst:
    """A layer of ours as a module of the reference: [B,C,T] in and out."""

    def __init__(self, layer: Any):
        self._layer = layer
        if isinstance(layer, unet1d.ConvBlock):  # has the reference's names as one of a network's blocks only
            self.blocks, self._prefix = [layer], "blocks.0."
        else:
            self.layer, self._prefix = layer, "layer."

    def __call__(self, x: Any, *others: Any) -> Any:
        out = self._layer(tf.transpose(x, [2, 0, 1]), *others)
        return tf.transpose(out, [1, 2, 0])

    def named(self, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {self._prefix + name: value for name, value in weights.items()}

    def gradients(self, tape: tf.GradientTape, total: Any) -> dict[str, np.ndarray]:
        return {k.removeprefix(self._prefix): v for k, v in case.torch_gradients(self, tape, total).items()}


class Nothing:
    """torch.nn.Identity, where no network is called."""


class Bundle:
    """Several objects that were recorded together."""

    def __init__(self, **parts: Any):
        self.__dict__.update(parts)


def residual_block(inp_channels: int, out_channels: int, **kwargs: Any) -> ChannelsFirst:
    return ChannelsFirst(temporal_unet.ResidualTemporalBlock(inp_channels, out_channels, **kwargs))


def attention_block(fn: Any) -> ChannelsFirst:
    """Residual(PreNorm(LinearAttention)): here it is one layer."""
    return ChannelsFirst(temporal_unet.AttentionBlock(**fn["fn"]))


def weighted(loss_type: str) -> Callable[..., TrajectoryDiffusion]:
    def make(weights: Any, action_dim: int) -> TrajectoryDiffusion:
        table = np.asarray(weights["__tensor__"], np.float32)
        horizon, width = table.shape
        diffusion = TrajectoryDiffusion(Nothing(), horizon, width - action_dim, action_dim, 2, loss_type)
        diffusion.loss_weights = table
        return diffusion

    return make


def regression(loss_type: str) -> Callable[[], ValueDiffusion]:
    return lambda: ValueDiffusion(Nothing(), 1, 1, 1, 2, loss_type)


_MODELS, _HELPERS = "diffuser.models.", "diffuser.models.helpers."
MAKE: dict[str, Callable[..., Any]] = {
    "torch.nn.Identity": Nothing,
    _MODELS + "temporal.TemporalUnet": temporal_unet.TemporalUnet,
    _MODELS + "temporal.ValueFunction": temporal_unet.ValueFunction,
    _MODELS + "temporal.ResidualTemporalBlock": residual_block,
    _MODELS + "diffusion.GaussianDiffusion": TrajectoryDiffusion,
    _MODELS + "diffusion.ValueDiffusion": ValueDiffusion,
    "diffuser.sampling.guides.ValueGuide": lambda model: Bundle(model=model),
    _HELPERS + "SinusoidalPosEmb": lambda dim: lambda x: sinusoidal_embedding(x, dim, floatx()),
    _HELPERS + "Conv1dBlock": lambda inp_channels, out_channels, **kwargs: ChannelsFirst(
        temporal_unet.conv_block(inp_channels, out_channels, **kwargs)
    ),
    _HELPERS + "Downsample1d": lambda dim: ChannelsFirst(unet1d.Downsample(dim)),
    _HELPERS + "Upsample1d": lambda dim: ChannelsFirst(unet1d.Upsample(dim)),
    _HELPERS + "LinearAttention": lambda **kwargs: ChannelsFirst(temporal_unet.LinearAttention(**kwargs)),
    _HELPERS + "LayerNorm": lambda dim: ChannelsFirst(temporal_unet.ChannelNorm(dim)),
    _HELPERS + "Residual": attention_block,
    _HELPERS + "WeightedL1": weighted("l1"),
    _HELPERS + "WeightedL2": weighted("l2"),
    _HELPERS + "ValueL1": regression("value_l1"),
    _HELPERS + "ValueL2": regression("value_l2"),
}


def build(spec: Any) -> Any:
    """Our object for a recorded specification."""
    if not isinstance(spec, dict):
        return spec
    if "bundle" in spec:
        return Bundle(**{name: build(part) for name, part in spec["bundle"].items()})
    if "__intdict__" in spec:
        return {int(k): v for k, v in spec["__intdict__"].items()}
    if "class" not in spec:
        return spec
    if spec["class"] == _HELPERS + "Residual":
        return attention_block(spec["kwargs"]["fn"]["kwargs"] | {"fn": spec["kwargs"]["fn"]["kwargs"]["fn"]["kwargs"]})
    return MAKE[spec["class"]](**{k: build(v) for k, v in spec["kwargs"].items()})


def load(name: str, model: Any, weights: dict[str, np.ndarray]) -> None:
    """Every recorded tensor goes into our object, schedule tables and loss weights checked against ours first."""
    if isinstance(model, Bundle):
        for part, child in vars(model).items():
            below = {k[len(part) + 1 :]: v for k, v in weights.items() if k.startswith(part + ".")}
            load(name, child, below)
    elif isinstance(model, (TrajectoryDiffusion, ValueDiffusion)):
        load_diffusion(name, model, weights)
    elif isinstance(model, ChannelsFirst):
        builder.load(name, model, model.named(weights))
    elif weights:
        builder.load(name, model, weights)


def load_diffusion(name: str, model: Any, weights: dict[str, np.ndarray]) -> None:
    tables = {}
    for theirs, ours in SCHEDULE_BUFFERS.items():
        if theirs in weights:
            tables[ours] = weights[theirs]
            if not np.allclose(getattr(model.schedule, ours), tables[ours], rtol=1e-6, atol=2e-7):
                raise Mismatch(f"{name}: schedule table {theirs} is not the reference's")
    model.schedule = dataclasses.replace(model.schedule, **tables)
    given = weights.get("loss_fn.weights", weights.get("weights"))
    if given is not None:
        if not np.allclose(model.loss_weights, given, rtol=1e-6, atol=0):
            raise Mismatch(f"{name}: the weights of the loss are not the reference's")
        model.loss_weights = given
    rest = {k: v for k, v in weights.items() if k.startswith("model.")}
    if rest:
        builder.load(name, model, rest)


# ---------- single calls ----------


def arguments(golden: Golden, cast: Cast) -> dict[str, Any]:
    """The recorded arguments as tensors; conditions by time index."""
    return {k: conditions(v) if isinstance(v, dict) else v for k, v in cast(golden.arguments).items()}


def conditions(given: dict[str, Any]) -> dict[int, Any]:
    return {int(t): observation for t, observation in given.items()}


def layer(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    return {"out": obj(*(v for k, v in given.items() if k != "cond"))}


def betas(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    return {"betas": cosine_betas(**{"denoising_steps": given["timesteps"]})}


def conditioning(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    return {"out": apply_conditions(**given)}


def error(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    compare = obj.weighted if isinstance(obj, TrajectoryDiffusion) else obj.regression
    return named_loss(compare(given["pred"], given["targ"]))


def loss_weights(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    return {"weights": obj.weights_of(given["action_weight"], given["discount"], given["weights_dict"])}


def q_sample(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    return {"out": obj.q_sample(**given, noise=draws[0])}


def q_posterior(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    return moments(obj.posterior(given["x_start"], given["x_t"], given["t"]))


def p_mean_variance(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    return moments(obj.p_mean_variance(given["x"], given["t"]))


def moments(found: tuple[Any, ...]) -> Outputs:
    return dict(zip(("mean", "variance", "log_variance"), found, strict=True))


def predict_start(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    return {"out": obj.predict_x0(given["x_t"], given["t"], given["noise"])}


def trajectory_loss(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    """Of predicted noise the reference overwrites entries with observations; ours does not, so here it is done for
    it: network and loss are compared all the same."""
    *t, noise = draws
    x, t, known = given.get("x", given.get("x_start")), given.get("t", t[0] if t else None), given["cond"]
    if not obj.predict_epsilon:
        return named_loss(obj.loss(x, known, t, noise))
    noisy = apply_conditions(obj.q_sample(x, t, noise), known, obj.action_dim)
    return named_loss(obj.weighted(apply_conditions(obj.model(noisy, t), known, obj.action_dim), noise))


def value_loss(obj: Any, given: dict[str, Any], draws: list[Any]) -> Outputs:
    *t, noise = draws
    x, t = given.get("x", given.get("x_start")), given.get("t", t[0] if t else None)
    return named_loss(obj.loss(x, given["cond"], t, noise, given["target"]))


def named_loss(found: tuple[Any, dict[str, Any]]) -> Outputs:
    value, infos = found
    return {"loss": value} | {f"info.{k}": v for k, v in infos.items()}


_GAUSSIAN, _VALUE = _MODELS + "diffusion.GaussianDiffusion", _MODELS + "diffusion.ValueDiffusion"
# (class or function of the reference, method) -> (adapter, rung of its outputs)
CALLS: dict[tuple[str, str], tuple[Callable[[Any, dict[str, Any], list[Any]], Outputs], int]] = {
    (_HELPERS + "cosine_beta_schedule", "__target__"): (betas, 1),
    (_HELPERS + "apply_conditioning", "__target__"): (conditioning, 1),
    (_MODELS + "temporal.TemporalUnet", "forward"): (layer, 2),
    (_MODELS + "temporal.ValueFunction", "forward"): (layer, 2),
    (_MODELS + "temporal.ResidualTemporalBlock", "forward"): (layer, 1),
    (_GAUSSIAN, "get_loss_weights"): (loss_weights, 3),
    (_GAUSSIAN, "q_sample"): (q_sample, 3),
    (_GAUSSIAN, "q_posterior"): (q_posterior, 3),
    (_GAUSSIAN, "predict_start_from_noise"): (predict_start, 3),
    (_GAUSSIAN, "p_losses"): (trajectory_loss, 3),
    (_GAUSSIAN, "loss"): (trajectory_loss, 3),
    (_VALUE, "p_losses"): (value_loss, 3),
    (_VALUE, "loss"): (value_loss, 3),
}
for _name in ("SinusoidalPosEmb", "Conv1dBlock", "Downsample1d", "Upsample1d", "LinearAttention", "LayerNorm"):
    CALLS[(_HELPERS + _name, "forward")] = (layer, 1)
CALLS[(_HELPERS + "Residual", "forward")] = (layer, 1)
for _name in ("WeightedL1", "WeightedL2", "ValueL1", "ValueL2"):
    CALLS[(_HELPERS + _name, "forward")] = (error, 3)


def convolutions(dtype: str) -> contextlib.AbstractContextManager[None]:
    """float64 proves the fast convolutions, which round more; in float32 the plain ones are held to the gates."""
    return plain_convolutions() if dtype == "float32" else contextlib.nullcontext()


def replay(golden: Golden) -> None:
    """One call, in both precisions where both are recorded."""
    for dtype, suffix in PRECISIONS:
        if golden.group("out" + suffix):
            with precision(dtype), convolutions(dtype):
                _replay(golden, dtype, suffix)


def _replay(golden: Golden, dtype: str, suffix: str) -> None:
    meta = golden.meta
    what = meta["target"] or meta["spec"]["class"]
    if (what, meta["method"]) not in CALLS:
        raise case.NotCovered(f"{golden.name}: no adapter for {what}.{meta['method']} in replay/diffuser.py")
    adapter, rung = CALLS[what, meta["method"]]
    obj, cast = build(meta["spec"]), caster(dtype)
    load(golden.name, obj, golden.weights)
    given, draws = arguments(golden, cast), [cast(draw) for _, draw in golden.draws]
    input_names = meta.get("input_grads", [])
    inputs = [given[name] for name in input_names]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        outputs = adapter(obj, given, draws)
        total = case.total_loss(outputs, meta, golden.group("out" + suffix))
    if total is not None:
        outputs["_total_loss"] = total
    comparison = Comparison(golden.name, rung, dtype)
    short = what.rsplit(".", 1)[-1] + ("" if meta["method"] in ("forward", "__target__") else "." + meta["method"])
    for name, value in golden.group("out" + suffix).items():
        if name not in outputs:
            raise Mismatch(f"{golden.name} [{dtype}]: ours gives no output {name!r}")
        rounding = own_rounding(golden, "out/" + name)
        quantity = f"{'DiffuserLite' if what.startswith('clean') else 'Diffuser'}'s {short} {name}"
        comparison.check("out/" + name, outputs[name], value, quantity=quantity, rounding=rounding)
    if meta["loss"]:
        taken = zip(input_names, tape.gradient(total, inputs), strict=True)
        ours = {f"input.{name}": grad.numpy() for name, grad in taken}
        has_weights = bool(golden.weights) and not isinstance(obj, Nothing)
        if isinstance(obj, ChannelsFirst):
            ours |= obj.gradients(tape, total)
        elif has_weights:
            ours |= case.torch_gradients(obj, tape, total)
        case.check_gradients(golden, dtype, suffix, obj, tape, total, comparison, ours)
