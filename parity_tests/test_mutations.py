"""The ladder watches: each mutation breaks one thing on purpose, and the rung that is there for it must go red."""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

from diffusion_rl.core import ema, optimizers, returns, reward_scaling
from diffusion_rl.diffusion import ddim, schedules
from diffusion_rl.interop import torch_names
from diffusion_rl.methods.off_policy import dsrl, fql
from diffusion_rl.methods.on_policy import dppo, fpo, ppo
from diffusion_rl.networks import layers, mlp, transformer, vision
from diffusion_rl.policies import diffusion
from parity_tests.replay import dispatch
from parity_tests.replay.case import NotCovered
from parity_tests.replay.compare import Mismatch
from parity_tests.replay.files import GOLDENS, Golden


def rewritten(function: Any, old: str, new: str) -> Any:
    """The same function with a piece of its source replaced; the piece must be there exactly once."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__} no longer holds {old!r} once: rewrite this mutation"
    source = re.sub(r"\A(@(?!tf\.custom_gradient)\w[^\n]*\n)+", "", source.replace(old, new))
    namespace = dict(vars(sys.modules[function.__module__]))
    exec(compile("from __future__ import annotations\n" + source, "<mutation>", "exec"), namespace)
    return namespace[function.__name__]


# name: (owner, attribute, piece of source, what it becomes, cases that must fail)
MUTATIONS: dict[str, tuple[Any, str, str, str, list[str]]] = {
    "AdamW: epsilon inside the root": (
        optimizers.AdamW,
        "apply",
        "tf.sqrt(v_new) / tf.cast(root_correction, dtype) + tf.constant(self.eps, dtype)",
        "tf.sqrt(v_new / tf.cast(root_correction, dtype) ** 2 + tf.constant(self.eps, dtype))",
        ["adamw_given_grads_0", "adamw_given_grads_1"],
    ),
    "AdamW: decay after the step": (
        optimizers.AdamW,
        "apply",
        "var.assign(value - tf.cast(step_size, dtype) * m_new / denominator)",
        "var.assign((var - tf.cast(step_size, dtype) * m_new / denominator) * tf.cast(decay, dtype))",
        ["adamw_given_grads_0"],
    ),
    "clipping: epsilon of the norm left out": (
        optimizers,
        "clip_by_global_norm",
        "(norm + 1e-6), 1.0",
        "norm, 1.0",
        ["adamw_given_grads_1"],
    ),
    "FQL: every step of the flow is clipped": (fql.FQL, "carried", "clip_each=False", "clip_each=True", ["fql_mean"]),
    "DSRL: noise critics are given w, not w / b": (
        dsrl.DSRL,
        "scaled",
        "return noise / self.noise_bound",
        "return noise",
        ["dsrl_na", "dsrl_sac"],
    ),
    "DSRL: the temperature's loss in alpha, not in its logarithm": (
        dsrl.DSRL,
        "loss_temperature",
        "tf.cast(self._log_alpha, self.dtype)",
        "self.alpha",
        ["dsrl_na"],
    ),
    "FPO++: the trust region on the other side": (
        fpo.FPO,
        "ratio_loss",
        "advantages < 0",
        "advantages > 0",
        ["fpo_plus_asymmetric"],
    ),
    "EMA: old and new exchanged": (
        ema,
        "ema_update",
        "return old * decay + (1 - decay) * new",
        "return new * decay + (1 - decay) * old",
        ["ema_0"],
    ),
    "advantages: biased deviation": (
        ppo.ClippedPPO,
        "normalised",
        "/ (n - 1)",
        "/ n",
        ["ppo_diffusion_loss_base", "ppo_diffusion_loss_ddim"],
    ),
    "advantages: quantiles not interpolated": (
        dppo,
        "quantile",
        "low + (high - low) * (position - tf.cast(below, ordered.dtype))",
        "low",
        ["ppo_diffusion_loss_quant"],
    ),
    "log-probabilities: mean before the clamp": (
        dppo,
        "chunk_log_prob",
        "tf.reduce_mean(tf.clip_by_value(log_prob, *LOG_PROB_RANGE)[..., :reward_horizon, :], axis=[-2, -1])",
        "tf.clip_by_value(tf.reduce_mean(log_prob[..., :reward_horizon, :], axis=[-2, -1]), *LOG_PROB_RANGE)",
        ["ppo_diffusion_loss_base"],
    ),
    "PPO: clip range the wrong way round": (
        dppo.DPPO,
        "clip_range",
        "tf.exp(rate * t) - 1",
        "tf.exp(rate * (1 - t)) - 1",
        ["ppo_diffusion_loss_base"],
    ),
    "value loss: minimum of the two": (
        dppo.DPPO,
        "value_loss",
        "tf.maximum(",
        "tf.minimum(",
        ["ppo_diffusion_loss_vclip"],
    ),
    "DDIM: noise not recomputed from the clamped x0": (
        ddim,
        "noise_from_x0",
        "(x - tf.sqrt(alpha) * x0) / sqrt_one_minus_alpha",
        "(x - tf.sqrt(alpha) * predict_x0(x, x * 0, alpha, sqrt_one_minus_alpha)) / sqrt_one_minus_alpha",
        ["diffusion_p_mean_var_ddim", "vpg_forward_ddim"],
    ),
    "DDPM: x0 not clamped": (
        diffusion.DiffusionPolicy,
        "denoised_mean",
        "        x0 = clip(x0, self.denoised_clip_value)\n        return",
        "        return",
        ["diffusion_p_mean_var_ddpm", "vpg_forward_ddpm_ftall"],
    ),
    "sampling: one fine-tuned step too many": (
        diffusion.FineTunedDiffusionPolicy,
        "sample",
        "first = n - self.ft_denoising_steps",
        "first = n - self.ft_denoising_steps - 1",
        ["vpg_forward_ddpm_ft4of8"],
    ),
    "loading: kernels not transposed": (
        torch_names.Parameter,
        "to_torch",
        "np.ascontiguousarray(channels_first(value, int(self.stacked))) if self.transposed else value",
        "value",
        ["net_mlp", "net_diffusion_mlp_res", "critic_obs_res"],
    ),
    "loading: height and width of kernels exchanged": (
        torch_names,
        "channels_last",
        "np.moveaxis(value, (first, first + 1), (-1, -2))",
        "value.T",
        ["net_vit_embed2", "critic_vit_1img"],
    ),
    "images: shifts taken as (y, x)": (
        vision.RandomShiftsAug,
        "__call__",
        "tf.reshape(shifts, [-1, 2])",
        "tf.reverse(tf.reshape(shifts, [-1, 2]), [1])",
        ["aug_random_shifts_a", "diffusion_loss_vision"],
    ),
    "attention: scores not scaled": (
        transformer.SelfAttention,
        "call",
        "math.sqrt(self.head_dim)",
        "1",
        ["net_vit_embed2", "net_vision_diffusion_mlp_1img"],
    ),
    "networks: residual taken after the activation": (
        mlp.ResidualBlock,
        "call",
        "self.l2(self.hidden(x)) + x",
        "self.l2(self.hidden(x)) + self.activate(x)",
        ["net_resmlp", "net_diffusion_mlp_res"],
    ),
    "time embedding: cosine first": (
        layers,
        "sinusoidal_embedding",
        "tf.concat([tf.sin(angles), tf.cos(angles)], axis=-1)",
        "tf.concat([tf.cos(angles), tf.sin(angles)], axis=-1)",
        ["net_sinusoidal_16", "net_diffusion_mlp_plain"],
    ),
    "schedule: grid ends at K": (
        schedules,
        "cosine_betas",
        "np.linspace(0, steps, steps)",
        "np.arange(steps)",
        ["sched_cosine_20", "schedules_all"],
    ),
    "GAE: the recursion goes on over terminations": (
        returns,
        "gae",
        "gamma * gae_lambda * nonterminal[t] * last",
        "gamma * gae_lambda * last",
        ["gae_0"],
    ),
    "reward scaling: biased variance": (
        reward_scaling.RunningMeanStd,
        "update",
        "moment / (total - 1)",
        "moment / total",
        ["reward_scaler_0"],
    ),
}


def apply(monkeypatch: pytest.MonkeyPatch, owner: Any, attribute: str, old: str, new: str) -> None:
    """Replace a function wherever a module of this package or of the replayer has imported it."""
    original = getattr(owner, attribute)
    mutated = rewritten(original, old, new)
    monkeypatch.setattr(owner, attribute, mutated)
    if inspect.ismodule(owner):
        for name, module in list(sys.modules.items()):
            if name.startswith(("diffusion_rl.", "parity_tests.")) and vars(module).get(attribute) is original:
                monkeypatch.setattr(module, attribute, mutated)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(name, monkeypatch):
    owner, attribute, old, new, cases = MUTATIONS[name]
    for case in cases:
        dispatch.replay(GOLDENS / f"{case}.npz")  # green before
    apply(monkeypatch, owner, attribute, old, new)
    for case in cases:
        with pytest.raises(Mismatch):
            dispatch.replay(GOLDENS / f"{case}.npz")


def test_messages_say_where_and_what_next(monkeypatch):
    apply(monkeypatch, layers, "mish", "n = e * (e + 2)", "n = e * (e + 3)")
    monkeypatch.setitem(layers.ACTIVATIONS, "Mish", layers.mish)
    with pytest.raises(Mismatch) as caught:
        dispatch.replay(GOLDENS / "net_resmlp.npz")
    message = str(caught.value)
    assert "net_resmlp [float32]: first divergence in out/out[0, 0]: ours" in message
    assert "What next" in message


def test_a_case_that_is_neither_covered_nor_listed_fails(tmp_path):
    """No silent skips."""
    golden = Golden.load(GOLDENS / "net_mlp.npz")
    meta = golden.meta | {"class": "model.common.new.Thing", "spec": {"class": "model.common.new.Thing", "kwargs": {}}}
    np.savez(tmp_path / "net_new.npz", meta=np.array(json.dumps(meta)), **golden.arrays)
    with pytest.raises(NotCovered, match="model.common.new.Thing"):
        dispatch.replay(tmp_path / "net_new.npz")
