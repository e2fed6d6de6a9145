"""How each recorded call is made on our side: one small adapter per method of the reference.

An adapter gets (object, golden, cast) and returns {name of the recorded output: tensor}. `cast` turns a recorded array
into a tensor of the precision under test. Recorded draws become noise arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from parity_tests.replay import flow_calls, off_policy_calls
from parity_tests.replay.build import EVALUATION, OURS, locate, table
from parity_tests.replay.files import Cast, Golden, Outputs


def caster(dtype: str) -> Cast:
    """Arrays to tensors; floating-point ones in `dtype`, integers as they are, nested dictionaries inside out."""

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cast(v) for k, v in value.items()}
        if isinstance(value, np.ndarray):
            return tf.constant(value, dtype if value.dtype.kind == "f" else None)
        return value

    return cast


def noise_of(golden: Golden, cast: Cast) -> Any:
    """All draws of a sampler as one array [steps + 1, B, H, A]."""
    return cast(np.stack([draw for _, draw in golden.draws]))


def network(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Forward pass; dropout masks, drawn in training mode, and shifts of images are arguments."""
    arguments = cast(golden.arguments)
    out = obj(*arguments.values(), **sight(golden.draws, cast))
    values = out if isinstance(out, tuple) else (out,)
    return dict(zip(golden.meta["returns"], values, strict=True))


def sight(draws: list[tuple[str, np.ndarray]], cast: Cast) -> dict[str, Any]:
    """Dropout masks, and shifts of images: the cameras' draws, [B,1,1,2] each, as [B,cameras,2]."""
    masks = [cast(draw) for fn, draw in draws if fn == "F.dropout.keep"]
    shifts = [draw[:, 0, 0] for fn, draw in draws if fn == "torch.randint"]
    return ({"keep_masks": masks} if masks else {}) | ({"shifts": cast(np.stack(shifts, axis=1))} if shifts else {})


def seen(policy: Any, cond: Any, draws: list[tuple[str, np.ndarray]], cast: Cast) -> Any:
    """The observation as the policy's network sees it with these draws."""
    return policy.network.encode(cond, **sight(draws, cast)) if draws else cond


def attributes(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    return {name: table(obj, name) for name in golden.meta["args"][0]}


def function(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """A function that is not a method: the first argument has another name."""
    first, *rest = golden.meta["args"]
    call = locate(golden.meta["target"])
    return {"out": call(cast(golden.resolve(first)), *rest, **golden.meta["kwargs"])}


def q_sample(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    return {"out": obj.q_sample(**cast(golden.arguments))}


def p_mean_var(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    mean, logvar = obj.p_mean_var(**cast(golden.arguments))[:2]
    return {"mu": mean, "logvar": logvar}


def p_losses(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Draws: the noise, then what the network draws to see its images."""
    arguments = cast(golden.arguments)
    (_, noise), *seeing = golden.draws
    cond = seen(obj, arguments["cond"], seeing, cast)
    return {"loss": obj.loss(arguments["x_start"], cond, arguments["t"], cast(noise))}


def supervised_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Draws: t, the noise, then what the network draws to see its images."""
    arguments = cast(golden.arguments)
    (_, t), (_, noise), *seeing = golden.draws
    cond = seen(obj, arguments["cond"], seeing, cast)
    return {"loss": obj.loss(arguments["x"], cond, cast(t), cast(noise))}


def sample_evaluation(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """The reference's evaluator ignores `deterministic` with DDPM and needs it with DDIM: always deterministic."""
    return _sample(obj.sample(cast(golden.arguments["cond"]), noise_of(golden, cast), deterministic=True))


def sample(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Chains are always returned by ours; `return_chain=False` only drops them."""
    arguments = cast(golden.arguments)
    arguments.pop("return_chain", None)
    return _sample(obj.sample(noise=noise_of(golden, cast), **arguments))


def _sample(result: Any) -> Outputs:
    return {"trajectories": result.trajectories, "chains": result.chains}


def log_probs(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    arguments = cast(golden.arguments)
    arguments.pop("get_ent", None)
    log_prob, eta = obj.log_probs(**arguments)
    return {"logprobs": log_prob, "eta": eta}


def log_probs_subsample(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    arguments = cast(golden.arguments)
    arguments.pop("get_ent", None)
    log_prob, eta = obj.log_probs_subsample(**arguments)
    return {"logprobs": log_prob, "eta": eta}


def reinforce_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    actor, critic, eta = obj.reinforce_loss(**cast(golden.arguments))
    return {"loss_actor": actor, "loss_critic": critic, "eta": eta}


def ppo_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    noise = {"bc_noise": noise_of(golden, cast)} if golden.draws else {}
    return obj.loss(**cast(golden.arguments), **noise)


def gaussian_sample(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Samples are always reparametrised and always come with their log-probability."""
    arguments = cast(golden.arguments)
    ((_, noise),) = golden.draws
    network = obj.base(True) if arguments.get("use_base_policy") else None
    action, log_prob = obj.sample(arguments["cond"], cast(noise), arguments.get("deterministic", False), network)
    return {"action": action, "logprob": log_prob, "out": action}


def mixture_sample(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    (_, modes), (_, noise) = golden.draws
    return {"out": obj.sample(**cast(golden.arguments), modes=tf.constant(modes[:, 0]), noise=cast(noise))}


def likelihood_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    arguments = cast(golden.arguments)
    loss, entropy = obj.loss(arguments.pop("true_action"), **arguments)
    return {"loss": loss, "infos.entropy": entropy}


def action_log_probs(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    return dict(zip(golden.meta["returns"], obj.log_probs(**cast(golden.arguments)), strict=True))


def gaussian_ppo_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    noise = {"bc_noise": cast(golden.draws[0][1])} if golden.draws else {}
    return obj.loss(**cast(golden.arguments), **noise)


def probes_of(obj: Any, golden: Golden, cast: Cast) -> Any:
    """Rademacher probes are recorded as the 0 and 1 they are made of."""
    ((fn, draw),) = golden.draws
    return cast((2.0 * draw - 1.0).astype(np.float32) if fn == "torch.randint" else draw)


def exact_log_probs(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    return {"logprobs": obj.exact_log_probs(*cast(golden.arguments).values(), probes_of(obj, golden, cast))}


def exact_ppo_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    return obj.loss(**cast(golden.arguments), probes=probes_of(obj, golden, cast))


_DIFFUSION = "model.diffusion.diffusion.DiffusionModel"
_VPG = "model.diffusion.diffusion_vpg.VPGDiffusion"
_PPO = "model.diffusion.diffusion_ppo.PPODiffusion"
_EXACT = "model.diffusion.diffusion_ppo_exact.PPOExactDiffusion"

# (class of the reference or None, method) -> (adapter, rung of its outputs)
CALLS: dict[tuple[str | None, str], tuple[Callable[[Any, Golden, Cast], Outputs], int]] = {
    (None, "__target__"): (function, 1),
    (_DIFFUSION, "__attrs__"): (attributes, 1),
    (_DIFFUSION, "q_sample"): (q_sample, 3),
    (_DIFFUSION, "p_mean_var"): (p_mean_var, 3),
    (_DIFFUSION, "p_losses"): (p_losses, 3),
    (_DIFFUSION, "loss"): (supervised_loss, 3),
    (EVALUATION, "forward"): (sample_evaluation, 3),
    (_VPG, "loss"): (reinforce_loss, 3),
    (_PPO, "loss"): (ppo_loss, 3),
    (_EXACT, "get_exact_logprobs"): (exact_log_probs, 3),
    (_EXACT, "loss"): (exact_ppo_loss, 3),
    ("model.common.gaussian.GaussianModel", "forward"): (gaussian_sample, 3),
    ("model.common.gaussian.GaussianModel", "loss"): (likelihood_loss, 3),
    ("model.common.gmm.GMMModel", "forward"): (mixture_sample, 3),
    ("model.common.gmm.GMMModel", "loss"): (likelihood_loss, 3),
    ("model.rl.gaussian_ppo.PPO_Gaussian", "loss"): (gaussian_ppo_loss, 3),
    ("model.rl.gmm_ppo.PPO_GMM", "loss"): (gaussian_ppo_loss, 3),
}
for _class in ("model.rl.gaussian_vpg.VPG_Gaussian", "model.rl.gaussian_ppo.PPO_Gaussian"):
    CALLS |= {(_class, "forward"): (gaussian_sample, 3), (_class, "get_logprobs"): (action_log_probs, 3)}
for _class in ("model.rl.gmm_vpg.VPG_GMM", "model.rl.gmm_ppo.PPO_GMM"):
    CALLS |= {(_class, "forward"): (mixture_sample, 3), (_class, "get_logprobs"): (action_log_probs, 3)}
for _class in (_VPG, _PPO):
    CALLS |= {
        (_class, "__attrs__"): (attributes, 1),
        (_class, "q_sample"): (q_sample, 3),
        (_class, "p_mean_var"): (p_mean_var, 3),
        (_class, "p_losses"): (p_losses, 3),
        (_class, "forward"): (sample, 3),
        (_class, "get_logprobs"): (log_probs, 3),
        (_class, "get_logprobs_subsample"): (log_probs_subsample, 3),
    }
CALLS |= off_policy_calls.CALLS
CALLS |= flow_calls.CALLS
for _class in off_policy_calls.DIFFUSION:
    CALLS |= {
        (_class, "__attrs__"): (attributes, 1),
        (_class, "q_sample"): (q_sample, 3),
        (_class, "p_mean_var"): (p_mean_var, 3),
    }
    for _method, _adapter in (("loss", supervised_loss), ("p_losses", p_losses)):
        CALLS.setdefault((_class, _method), (_adapter, 3))
for _class in off_policy_calls.GAUSSIAN:
    CALLS.setdefault((_class, "forward"), (gaussian_sample, 3))
for _class in OURS:
    if (_class, "forward") in CALLS:
        continue
    if _class.endswith(".RandomShiftsAug"):
        CALLS[(_class, "__call__")] = (network, 1)
    elif _class.startswith(("model.common.", "model.diffusion.mlp_diffusion.", "model.diffusion.unet.")):
        CALLS[(_class, "forward")] = (network, 2)
    elif _class.startswith(("model.diffusion.modules.", "model.diffusion.eta.")):
        CALLS |= {(_class, "forward"): (network, 1), (_class, "__call__"): (network, 1)}
