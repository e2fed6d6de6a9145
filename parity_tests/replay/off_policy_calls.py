"""How the recorded calls of the off-policy algorithms are made on our side; adapters as in `calls`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from diffusion_rl.core.transitions import Transitions
from diffusion_rl.methods.off_policy.calql import CriticDraws
from parity_tests.replay.files import Cast, Golden, Outputs

_RWR = "model.diffusion.diffusion_rwr.RWRDiffusion"
_AWR = "model.diffusion.diffusion_awr.AWRDiffusion"
_DQL = "model.diffusion.diffusion_dql.DQLDiffusion"
_DIPO = "model.diffusion.diffusion_dipo.DIPODiffusion"
_IDQL = "model.diffusion.diffusion_idql.IDQLDiffusion"
_QSM = "model.diffusion.diffusion_qsm.QSMDiffusion"
_GAUSSIAN_RWR = "model.rl.gaussian_rwr.RWR_Gaussian"
_GAUSSIAN_AWR = "model.rl.gaussian_awr.AWR_Gaussian"
_SAC = "model.rl.gaussian_sac.SAC_Gaussian"
_RLPD = "model.rl.gaussian_rlpd.RLPD_Gaussian"
_IBRL = "model.rl.gaussian_ibrl.IBRL_Gaussian"
_CALQL = "model.rl.gaussian_calql.CalQL_Gaussian"

DIFFUSION = (_RWR, _AWR, _DQL, _DIPO, _IDQL, _QSM)
GAUSSIAN = (_GAUSSIAN_RWR, _GAUSSIAN_AWR, _SAC, _RLPD, _CALQL)


def batch_of(arguments: dict[str, Any]) -> Transitions:
    """Recorded arguments as rows of experience."""
    rows = {k: arguments[k] for k in ("actions", "rewards", "terminated", "returns") if k in arguments}
    for name in ("obs", "next_obs"):
        if name in arguments:
            rows[name] = arguments[name]["state"]
    return Transitions(**{"actions": None} | rows)


def draws_of(golden: Golden, cast: Cast, *functions: str) -> list[Any]:
    """Recorded draws of these functions, in order; of all functions if none is named."""
    return [cast(draw) for fn, draw in golden.draws if not functions or fn in functions]


def chain(draws: list[Any]) -> Any:
    """The draws of one sample as [K+1,B,H,A]."""
    return tf.stack(draws)


# ---------- diffusion ----------


def sample(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    arguments = cast(golden.arguments)
    return {"out": obj.sample(arguments["cond"], chain(draws_of(golden, cast)), arguments.get("deterministic", False))}


def target_sample(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    arguments, noise = cast(golden.arguments), chain(draws_of(golden, cast))
    return {"out": obj.target_sample(arguments["cond"], noise, arguments.get("deterministic", False))}


def weighted_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Draws: t, the noise; or the noise alone, where t is an argument."""
    a, draws = cast(golden.arguments), draws_of(golden, cast)
    t, noise = draws if len(draws) == 2 else (a["t"], *draws)
    batch = Transitions(obs=a["cond"]["state"], actions=a.get("x", a.get("x_start")))
    return {"loss": obj.weighted_loss(batch, a["rewards"], {"t": t, "noise": noise})}


def critic_loss_of_samples(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a = cast(golden.arguments)
    return {"loss": obj.loss_critic(batch_of(a), a["gamma"], chain(draws_of(golden, cast)))}


def value_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a = cast(golden.arguments)
    return {"loss": obj.loss_critic(a["obs"], a["advantages"])}


def dql_loss_actor(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Draws: of the sample, t, the noise of the denoising loss, the coin."""
    a, (*noise, t, denoising_noise, coin) = cast(golden.arguments), draws_of(golden, cast)
    return {"loss": obj.loss_actor(a["obs"]["state"], a["eta"], a["act_steps"], chain(noise), t, denoising_noise, coin)}


def qsm_loss_actor(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a, (noise, t) = cast(golden.arguments), draws_of(golden, cast)
    return {"loss": obj.loss_actor(a["obs"]["state"], a["actions"], a["q_grad_coeff"], noise, t)}


def advantages(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a = cast(golden.arguments)
    return {"out": obj.compute_advantages(a["obs"], a["actions"])}


def idql_loss_v(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    return {"loss": obj.loss_critic_v(batch_of(cast(golden.arguments)))}


def idql_loss_q(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a = cast(golden.arguments)
    return {"loss": obj.loss_critic_q(batch_of(a), a["gamma"])}


def choice(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Candidates and the recorded choice among them."""
    arguments = cast(golden.arguments)
    noise = chain(draws_of(golden, cast, "torch.randn", "torch.randn_like"))
    return _chosen(obj.choices(arguments.pop("cond"), noise, **arguments), golden)


def _chosen(found: Any, golden: Golden) -> Outputs:
    if not isinstance(found, tuple):
        return {"out": found}
    (chosen,) = [draw for fn, draw in golden.draws if fn == "torch.multinomial"]
    return {"out": tf.gather(found[0], chosen[:, 0], batch_dims=1)}


# ---------- Gaussian ----------


def weighted_likelihood(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a = cast(golden.arguments)
    return {"loss": obj.weighted_loss(batch_of(a), a["reward_weights"], {})}


def sac_loss_critic(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a = cast(golden.arguments)
    return {"loss": obj.loss_critic(batch_of(a), a["gamma"], a["alpha"], *draws_of(golden, cast))}


def soft_loss_actor(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a = cast(golden.arguments)
    return {"loss": obj.loss_actor(a["obs"]["state"], a["alpha"], *draws_of(golden, cast))}


def loss_temperature(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a = cast(golden.arguments)
    return {"loss": obj.loss_temperature(a["obs"]["state"], a["alpha"], a["target_entropy"], *draws_of(golden, cast))}


def _pair(golden: Golden) -> Any:
    return tf.constant(next(draw for fn, draw in golden.draws if fn == "torch.randperm")[:2])


def rlpd_loss_critic(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a, (noise,) = cast(golden.arguments), draws_of(golden, cast, "Normal.sample.eps")
    return {"loss": obj.loss_critic(batch_of(a), a["gamma"], a["alpha"], _pair(golden), noise)}


def ibrl_loss_critic(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a, noise = cast(golden.arguments), tf.stack(draws_of(golden, cast, "Normal.sample.eps"))
    return {"loss": obj.loss_critic(batch_of(a), a["gamma"], _pair(golden), noise)}


def ibrl_loss_actor(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    return {"loss": obj.loss_actor(cast(golden.arguments)["obs"]["state"], *draws_of(golden, cast))}


def ibrl_choice(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a = cast(golden.arguments)
    noise = tf.stack(draws_of(golden, cast, "Normal.sample.eps", "Normal.rsample.eps"))
    return _chosen(obj.choices(a["cond"], _pair(golden), noise, a.get("deterministic", False)), golden)


def calql_loss_critic(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    a, (next_noise, here, there) = cast(golden.arguments), draws_of(golden, cast)
    draws = CriticDraws(a["random_actions"], next_noise, tf.stack([here, there]))
    return {"loss": obj.loss_critic(batch_of(a), a["gamma"], draws)}


# ---------- targets ----------


def state_left(name: str) -> Callable[[Any, Golden, Cast], Outputs]:
    """A method of which the state that it leaves is compared."""

    def call(obj: Any, golden: Golden, cast: Cast) -> Outputs:
        getattr(obj, name)(*golden.meta["args"], **golden.meta["kwargs"])
        return {}

    return call


# (class of the reference, method) -> (adapter, rung of its outputs)
CALLS: dict[tuple[str | None, str], tuple[Callable[[Any, Golden, Cast], Outputs], int]] = {
    (_AWR, "loss_critic"): (value_loss, 3),
    (_GAUSSIAN_AWR, "loss_critic"): (value_loss, 3),
    (_DQL, "loss_actor"): (dql_loss_actor, 3),
    (_DQL, "forward_train"): (sample, 3),
    (_QSM, "loss_actor"): (qsm_loss_actor, 3),
    (_IDQL, "compute_advantages"): (advantages, 3),
    (_IDQL, "loss_critic_v"): (idql_loss_v, 3),
    (_IDQL, "loss_critic_q"): (idql_loss_q, 3),
    (_IDQL, "forward"): (choice, 3),
    (_DIPO, "forward"): (target_sample, 3),
    (_SAC, "loss_critic"): (sac_loss_critic, 3),
    (_RLPD, "loss_critic"): (rlpd_loss_critic, 3),
    (_IBRL, "loss_critic"): (ibrl_loss_critic, 3),
    (_IBRL, "loss_actor"): (ibrl_loss_actor, 3),
    (_IBRL, "forward"): (ibrl_choice, 3),
    (_CALQL, "loss_critic"): (calql_loss_critic, 3),
}
for _class in (_RWR, _AWR, _DQL, _QSM):
    CALLS[(_class, "forward")] = (sample, 3)
for _class in (_RWR, _AWR, _QSM):
    CALLS |= {(_class, "loss"): (weighted_loss, 3), (_class, "p_losses"): (weighted_loss, 3)}
for _class in (_DQL, _DIPO, _QSM):
    CALLS[(_class, "loss_critic")] = (critic_loss_of_samples, 3)
for _class in (_GAUSSIAN_RWR, _GAUSSIAN_AWR):
    CALLS[(_class, "loss")] = (weighted_likelihood, 3)
for _class in (_SAC, _RLPD, _CALQL):
    CALLS |= {(_class, "loss_actor"): (soft_loss_actor, 3), (_class, "loss_temperature"): (loss_temperature, 3)}
for _class in (_DQL, _DIPO, _IDQL, _QSM, _SAC, _RLPD, _IBRL, _CALQL):
    for _method in ("update_target_critic", "update_target_actor"):
        CALLS[(_class, _method)] = (state_left(_method), 5)
