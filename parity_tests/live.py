"""Recording the genuine reference live, in memory, in the format of the golden files (`--upstream PATH`).

The reference is imported from its checkout and run on CPU; its random draws are replaced by drawn arrays that are kept.
What comes out is a `Golden`, which the replayer compares with ours like one from a file.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import sys
import tempfile
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from parity_tests.drawn import Draws
from parity_tests.reference.forward import stored, tensors
from parity_tests.replay.files import Golden
from parity_tests.replay.scripted import ScriptedEnv

LOSS_PARTS = ("pg_loss", "entropy_loss", "v_loss", "clipfrac", "approx_kl", "ratio", "bc_loss", "eta")
ROLLOUT = ("reward_trajs", "terminated_trajs", "firsts_trajs", "chains_trajs", "obs_trajs") + (
    "avg_episode_reward", "avg_best_reward", "success_rate", "num_episode_finished",
)  # fmt: skip
UPDATE = ("values_trajs", "logprobs_trajs", "advantages_trajs", "returns_trajs", "explained_var", "clipfracs")
AGENT = "agent.finetune.train_ppo_diffusion_agent.TrainPPODiffusionAgent"


def make_importable(checkout: str) -> None:
    """Let the reference's packages be imported; what it only needs on a user's machine is replaced by nothing."""
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    wandb, env, gym_utils = (types.ModuleType(n) for n in ("wandb", "env", "env.gym_utils"))
    gym_utils.make_async = None
    sys.modules.setdefault("wandb", wandb)
    sys.modules["env"], sys.modules["env.gym_utils"] = env, gym_utils
    env.gym_utils = gym_utils


def locate(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def build(spec: Any) -> Any:
    """The reference's object."""
    if isinstance(spec, dict) and "class" in spec:
        kwargs = {k: build(v) for k, v in spec["kwargs"].items()}
        if "action_dim" in kwargs and "obs_dim" in kwargs:
            kwargs["device"] = "cpu"
        return locate(spec["class"])(**kwargs)
    return spec


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """New tensors are float64, and casts to float go to float64 as well."""
    torch.set_default_dtype(torch.float64)
    with mock.patch.object(torch.Tensor, "float", lambda self, *a, **k: self.double()):
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


class Source:
    """Stands in for torch's random functions: draws and keeps, or plays again what was kept."""

    def __init__(self, draws: Draws, played: list[tuple[str, np.ndarray]] | None = None):
        self.draws, self.played, self.kept = draws, list(played or ()), []

    def take(self, fn: str, shape: tuple[int, ...], draw: Any) -> torch.Tensor:
        if self.played:
            kind, array = self.played.pop(0)
            assert kind == fn and array.shape == tuple(shape), (kind, fn, array.shape, shape)
        else:
            array = draw()
        self.kept.append((fn, array))
        tensor = torch.from_numpy(array.copy())
        return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        generator = self.draws.generator

        def normal(fn: str, shape: tuple[int, ...]) -> torch.Tensor:
            return self.take(fn, shape, lambda: generator.standard_normal(shape).astype(np.float32))

        def randint(low: int, high: int, size: tuple[int, ...], dtype: Any = None, **unused: Any) -> torch.Tensor:
            return self.take("torch.randint", size, lambda: generator.integers(low, high, size)).to(dtype)

        def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
            if not training or p == 0:
                return x
            shape = tuple(x.shape)
            return x * self.take("F.dropout.keep", shape, lambda: generator.random(shape) >= p) / (1 - p)

        def modes(probabilities: torch.Tensor, n: int, replacement: bool = False) -> torch.Tensor:
            shape = (len(probabilities), n)
            return self.take("torch.multinomial", shape, lambda: generator.integers(probabilities.shape[1], size=shape))

        def sample(name: str) -> Any:
            def at_mean_and_scale(dist: torch.distributions.Normal, sample_shape: Any = ()) -> torch.Tensor:
                with torch.set_grad_enabled(name == "rsample" and torch.is_grad_enabled()):
                    return dist.loc + dist.scale * normal(f"Normal.{name}.eps", tuple(dist.loc.shape))

            return at_mean_and_scale

        def randperm(n: int, **unused: Any) -> torch.Tensor:
            return self.take("torch.randperm", (n,), lambda: generator.permutation(n))

        with (
            mock.patch.object(torch, "randn", lambda shape, **unused: normal("torch.randn", tuple(shape))),
            mock.patch.object(torch, "randn_like", lambda x, **unused: normal("torch.randn_like", tuple(x.shape))),
            mock.patch.object(torch, "randint", randint),
            mock.patch.object(torch, "randperm", randperm),
            mock.patch.object(torch, "multinomial", modes),
            mock.patch.object(torch.distributions.Normal, "sample", sample("sample")),
            mock.patch.object(torch.distributions.Normal, "rsample", sample("rsample")),
            mock.patch.object(torch.nn.functional, "dropout", dropout),
        ):
            yield


def scramble(model: torch.nn.Module, draws: Draws) -> None:
    """Drawn weights everywhere, so that copies differ and gains are not one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.from_numpy(draws.normal(*parameter.shape, scale=0.2)).to(parameter.dtype))


def arrays_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}


def aliases_of(model: torch.nn.Module) -> dict[str, str]:
    """Names of tensors that appeared before under another name."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def tables_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Schedule tensors, which the reference keeps as plain attributes."""
    return {f"in/sched.{k}": v.numpy().copy() for k, v in vars(model).items() if torch.is_tensor(v)}


def as_double(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model).double()
    for key, value in list(vars(model).items()):
        if torch.is_tensor(value) and value.is_floating_point():
            setattr(model, key, value.double())
    return model


def record_call(
    spec: dict[str, Any],
    method: str,
    prepare: Any,
    returns: tuple[str, ...] | None,
    loss: Any = None,
    draws: Draws | None = None,
) -> Golden:
    """One call of one method, with gradients where a loss is given.

    Args:
        prepare: (the reference's object, draws) -> arguments by name, as arrays.
        returns: names of the returned values; None: they are numbered.
        loss: weights of the returned values, or "mean_square".
    """
    draws = draws or Draws(0, "float32")
    torch.manual_seed(int(draws.integers(2**31, 1)[0]))
    model = build(spec)
    scramble(model, draws)
    arguments = prepare(model, draws)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    meta: dict[str, Any] = {
        "kind": "case", "spec": spec, "class": spec["class"], "method": method, "target": None, "mode": "train",
        "arg_names": list(arguments), "kwargs": {}, "loss": loss,
        "non_trainable": [n for n, p in model.named_parameters() if not p.requires_grad],
        "aliases": aliases_of(model), "state_after": None,
    }  # fmt: skip
    arrays = {"w/" + k: v for k, v in arrays_of(model).items() if k not in meta["aliases"]} | tables_of(model)
    meta["args"] = [stored(name, value, arrays) for name, value in arguments.items()]
    source = Source(draws)
    results = {}
    for double, suffix in ((False, ""), (True, "64")):
        with double_precision() if double else contextlib.nullcontext():
            subject = as_double(model) if double else model
            source = Source(draws, source.kept)
            given = tensors(arguments, torch.float64 if double else torch.float32)
            results[suffix] = _call(subject, method, given, returns, loss, names, source)
        outputs, grads = results[suffix]
        meta["returns"] = [name for name in outputs if name != "_total_loss"] if returns is None else list(returns)
        arrays |= {f"out{suffix}/{k}": v for k, v in outputs.items()}
        arrays |= {f"grad{suffix}/{k}": v for k, v in grads.items()}
    meta["draws"] = [{"name": f"in/draw_{i:03d}", "fn": fn} for i, (fn, _) in enumerate(source.kept)]
    arrays |= {f"in/draw_{i:03d}": array for i, (_, array) in enumerate(source.kept)}
    meta["grad_none"] = [n for n in names if loss and n not in results[""][1]]
    return Golden(f"live/{spec['class'].rsplit('.', 1)[-1]}.{method}", meta, arrays)


def _call(model: Any, method: str, arguments: dict, returns: Any, loss: Any, names: list, source: Source) -> tuple:
    with source.active(), torch.set_grad_enabled(bool(loss)):
        values = getattr(model, method)(**arguments)
    values = values if isinstance(values, tuple) else (values,)
    values = dict(zip(returns or [f"out{i}" for i in range(len(values))], values, strict=True))
    named = {k: v for k, v in values.items() if v is not None and not isinstance(v, dict)}
    named |= {f"{k}.{part}": v for k, parts in values.items() if isinstance(parts, dict) for part, v in parts.items()}
    outputs = {k: np.asarray(v.detach() if torch.is_tensor(v) else v) for k, v in named.items()}
    grads: dict[str, np.ndarray] = {}
    if loss:
        if loss == "mean_square":
            total = sum((v**2).mean() for v in values.values())
        else:
            total = sum(weight * values[k] for k, weight in loss.items())
        outputs["_total_loss"] = total.detach().numpy()
        parameters = dict(model.named_parameters())
        if total.requires_grad:
            found = torch.autograd.grad(total, [parameters[n] for n in names], allow_unused=True)
            grads = {n: g.numpy() for n, g in zip(names, found, strict=True) if g is not None}
    return outputs, grads


# ---------- whole runs ----------


def record_agent(name: str, spec: dict[str, Any], cfg: dict[str, Any], draws: Draws) -> Golden:
    """The genuine DPPO agent on a scripted environment, to its last iteration."""
    train, env_cfg = cfg["train"], cfg["env"]
    n, envs = train["n_train_itr"] * train["n_steps"], env_cfg["n_envs"]
    frames = (envs, cfg["cond_steps"], cfg["obs_dim"])
    terminated = draws.generator.random((n, envs)) < 0.2
    double = Draws(int(draws.integers(2**31, 1)[0]))
    script = {
        "reset_obs": double.normal(train["n_train_itr"] + 1, *frames),
        "obs": double.normal(n, *frames),
        "final_obs": double.normal(n, *frames),
        "reward": double.normal(n, envs) + 0.5,
        "terminated": terminated,
        "truncated": (draws.generator.random((n, envs)) < 0.15) & ~terminated,
    }
    torch.manual_seed(int(draws.integers(2**31, 1)[0]))
    model = build(spec)
    scramble(model, draws)
    before = arrays_of(model)
    meta: dict[str, Any] = {
        "kind": "agent", "agent_class": AGENT, "spec": spec, "cfg": cfg, "dataset": None, "aliases": aliases_of(model),
    }  # fmt: skip
    arrays = {"in/env." + k: v for k, v in script.items()} | tables_of(model)
    arrays |= {"w/" + k: v for k, v in before.items() if k not in meta["aliases"]}
    source, results = Source(draws), {}
    for double_run, suffix in ((False, ""), (True, "64")):
        with double_precision() if double_run else contextlib.nullcontext():
            source = Source(draws, source.kept)
            results[suffix] = _run_agent(spec, cfg, script, before, source, double_run)
        arrays |= {f"out{suffix}/{k}": v for k, v in results[suffix].items()}
    meta["draws"] = [{"name": f"in/draw_{i:04d}", "fn": fn} for i, (fn, _) in enumerate(source.kept)]
    arrays |= {f"in/draw_{i:04d}": array for i, (_, array) in enumerate(source.kept)}
    return Golden(f"live/{name}", meta, arrays)


def _run_agent(spec: dict, cfg: dict, script: dict, weights: dict, source: Source, double: bool) -> dict[str, Any]:
    from omegaconf import OmegaConf

    model = build(spec)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    model = as_double(model) if double else model
    if hasattr(model, "actor"):
        model.actor = model.network  # deepcopy keeps the sharing; said again to be sure
    env = _Env(ScriptedEnv(script, cfg["act_steps"]))
    outputs: dict[str, Any] = {}
    calls: dict[str, list[float]] = {k: [] for k in LOSS_PARTS}
    rates: dict[str, list[float]] = {}
    agent_module = importlib.import_module("agent.finetune.train_agent")
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("hydra.utils.instantiate", lambda *a, **k: model),
        mock.patch.object(agent_module, "make_async", lambda *a, **k: env),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        agent = locate(AGENT)(OmegaConf.create(copy.deepcopy(cfg) | {"logdir": folder}))
        loss = model.loss

        def watched_loss(*args: Any, **kwargs: Any) -> Any:
            values = loss(*args, **kwargs)
            for key, value in zip(LOSS_PARTS, values, strict=True):
                calls[key].append(float(value))
            return values

        def at_the_end_of_an_iteration() -> None:
            seen = sys._getframe(1).f_locals
            i, evaluating = agent.itr, seen["eval_mode"]
            outputs[f"itr{i}.eval_mode"] = np.asarray(evaluating)
            for key in ROLLOUT if evaluating else ROLLOUT + UPDATE:
                value = seen[key]["state"] if isinstance(seen[key], dict) else seen[key]
                outputs[f"itr{i}.{key}"] = value.numpy() if torch.is_tensor(value) else np.array(value)
            for key in ("actor_optimizer", "critic_optimizer", "eta_optimizer"):
                if hasattr(agent, key):
                    rates.setdefault(key, []).append(getattr(agent, key).param_groups[0]["lr"])

        model.loss, agent.save_model = watched_loss, at_the_end_of_an_iteration
        with source.active():
            agent.run()
    outputs |= {"calls.loss." + k: np.array(v) for k, v in calls.items()}
    outputs |= {"after_itr." + k: np.array(v) for k, v in rates.items()}
    outputs["env_actions"] = np.stack(env.scripted.actions)
    after = arrays_of(model)
    changed = {k for k, v in after.items() if not np.array_equal(v.astype(weights[k].dtype), weights[k])}
    return outputs | {"final." + k: after[k] for k in changed}


class _Env:
    """The scripted environment under the reference's names."""

    def __init__(self, scripted: ScriptedEnv):
        self.scripted, self.action_space = scripted, None

    def seed(self, seeds: Any) -> None:
        pass

    def reset_arg(self, options_list: Any = None) -> dict[str, np.ndarray]:
        return self.scripted.reset()

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        step = self.scripted.step(actions)
        return step.observations, step.rewards, step.terminated, step.truncated, [{} for _ in step.rewards]
