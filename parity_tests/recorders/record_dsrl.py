"""Records DSRL from its authors' fork of stable-baselines3 (PyTorch), in double precision.

    python parity_tests/recorders/record_dsrl.py CHECKOUT DIR

CHECKOUT is one of ajwagen/stable-baselines3-dsrl; what it needs of packages: torch, gymnasium, cloudpickle, pandas,
matplotlib. The frozen policy is a small flow of this file. Of DSRL-NA and of DSRL-SAC: two calls of `train`, each with
several steps, and the gradients of every first one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from recording import Tape, commit_of, save, weights_like  # noqa: E402

O, A, H, B, BOUND, WIDTH = 5, 3, 2, 8, 1.5, 8  # noqa: E741
CALLS, STEPS, NOISE_STEPS, FLOW_STEPS = 2, 2, 3, 2
OPTIONS: dict[str, Any] = {"gamma": 0.9, "tau": 0.05, "learning_rate": 3e-3, "target_entropy": 0.5}
FROZEN = {"0.weight": (WIDTH, H * A + 1 + O), "0.bias": (WIDTH,), "1.weight": (H * A, WIDTH), "1.bias": (H * A,)}
FIELDS = ("observations", "actions", "next_observations", "dones", "rewards")


class Nothing(gymnasium.Env):
    """Has spaces."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (O,), np.float32)
    action_space = gymnasium.spaces.Box(-BOUND, BOUND, (H * A,), np.float32)


class Batches:
    """Stands in the place of a replay buffer: draws a batch at every call, and keeps it."""

    def __init__(self, samples: Any):
        self.samples, self.rng = samples, np.random.default_rng(5)
        self.kept: list[dict[str, np.ndarray]] = []

    def sample(self, batch_size: int, env: Any = None) -> Any:
        drawn = {
            "observations": self.rng.normal(size=(batch_size, O)),
            "actions": self.rng.uniform(-1, 1, size=(batch_size, H * A)),
            "next_observations": self.rng.normal(size=(batch_size, O)),
            "dones": (self.rng.uniform(size=(batch_size, 1)) < 0.3).astype(np.float64),
            "rewards": self.rng.normal(size=(batch_size, 1)),
        }
        self.kept.append(drawn)
        return self.samples(**{name: torch.from_numpy(value) for name, value in drawn.items()})


def frozen_policy(weights: dict[str, np.ndarray]) -> Any:
    """Returns a flow of one hidden layer, v = W1 tanh(W0 [x, t, o]); each of Euler's steps stays within bounds."""
    w = {name: torch.from_numpy(value) for name, value in weights.items()}

    def act(observations: Any, noise: Any, return_numpy: bool = True) -> Any:
        x = noise.reshape(len(noise), -1)
        for i in range(FLOW_STEPS):
            inputs = torch.cat([x, torch.full((len(x), 1), i / FLOW_STEPS), observations], dim=1)
            hidden = torch.tanh(inputs @ w["0.weight"].T + w["0.bias"])
            x = torch.clamp(x + (hidden @ w["1.weight"].T + w["1.bias"]) / FLOW_STEPS, -1, 1)
        return x.reshape(noise.shape)

    return act


def keep_gradients(optimizer: Any, names: dict[int, str], kept: dict[str, np.ndarray]) -> None:
    """Lets an optimizer keep the gradients of its first step."""
    step, parameters = optimizer.step, optimizer.param_groups[0]["params"]

    def keeping(*args: Any, **kwargs: Any) -> Any:
        for parameter in parameters:
            kept.setdefault(names[id(parameter)], parameter.grad.detach().numpy().copy())
        return step(*args, **kwargs)

    optimizer.step = keeping


def record(name: str, agent_class: Any, samples: Any, logger: Any, meta: dict[str, Any], folder: str) -> None:
    """Writes one case."""
    aliased, tape = name == "dsrl_na", Tape(11)
    frozen = weights_like(FROZEN, 3, lambda key: False)
    layers = {"pi": [WIDTH, WIDTH], "qf": [WIDTH, WIDTH]}
    kwargs: dict[str, Any] = {"net_arch": layers, "activation_fn": torch.nn.Tanh, "n_critics": 2}
    kwargs["post_linear_modules"] = [torch.nn.LayerNorm]
    own: dict[str, Any] = {}
    if aliased:
        own = {"diffusion_policy": frozen_policy(frozen), "diffusion_act_dim": (H, A)}
        own["noise_critic_grad_steps"] = NOISE_STEPS
    fixed = {"buffer_size": 10, "ent_coef": "auto_0.5", "device": "cpu", "batch_size": B}
    model = agent_class("MlpPolicy", Nothing(), policy_kwargs=kwargs, **fixed, **OPTIONS, **own)
    model.set_logger(logger(None, []))
    model.replay_buffer = Batches(samples)
    modules = {"actor": model.actor, "critic": model.critic, "critic_target": model.critic_target}
    modules |= {"critic_noise": model.critic_noise} if aliased else {}
    tensors = {f"{part}.{key}": p for part, module in modules.items() for key, p in module.named_parameters()}
    normed = {key for key, p in tensors.items() if p.ndim == 1 and key.endswith("weight")}
    weights = weights_like({key: tuple(p.shape) for key, p in tensors.items()}, 7, normed.__contains__)
    for key, parameter in tensors.items():
        parameter.data.copy_(torch.from_numpy(weights[key]))
    names, gradients = {id(p): key for key, p in tensors.items()}, dict[str, np.ndarray]()
    names[id(model.log_ent_coef)] = "log_ent_coef"
    for optimizer in (m.optimizer for part, m in modules.items() if part != "critic_target"):
        keep_gradients(optimizer, names, gradients)
    keep_gradients(model.ent_coef_optimizer, names, gradients)
    torch.distributions.normal._standard_normal = lambda shape, dtype, device: torch.from_numpy(
        tape.take("normal", shape)
    )
    torch.randn = lambda *shape: torch.from_numpy(tape.take("normal", shape))
    out: dict[str, Any] = {}
    for call in range(CALLS):
        model.train(STEPS, B)
        logged = {key.removeprefix("train/"): value for key, value in model.logger.name_to_value.items()}
        out |= {f"call{call}.{k}": np.float64(v) for k, v in logged.items() if "loss" in k or k == "ent_coef"}
        out[f"call{call}.log_ent_coef"] = model.log_ent_coef.detach().numpy().copy()[0]
    out |= {f"final.{key}": parameter.detach().numpy() for key, parameter in tensors.items()}
    given = {key: np.stack([batch[key] for batch in model.replay_buffer.kept]) for key in FIELDS}
    config = {**OPTIONS, "calls": CALLS, "steps": STEPS, "noise_steps": NOISE_STEPS if aliased else 0}
    config |= {"noise_bound": BOUND, "init_temperature": 0.5, "width": WIDTH, "horizon_steps": H, "action_dim": A}
    config |= {"flow_steps": FLOW_STEPS}
    w = weights | {f"frozen.{key}": value for key, value in frozen.items()}
    meta = {**meta, "class_path": f"{agent_class.__module__}.{agent_class.__name__}", "config": config}
    save(folder, name, meta, tape, given, w=w, out64=out, grad64=gradients)


def main(checkout: str, folder: str) -> None:
    sys.path.insert(0, checkout)
    from stable_baselines3 import DSRL, SAC
    from stable_baselines3.common import policies
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    torch.set_default_dtype(torch.float64)
    policies.preprocess_obs = lambda obs, space, normalize_images: obs  # it would make them float32
    meta = {"repository": "ajwagen/stable-baselines3-dsrl", "commit": commit_of(checkout), "runner": "dsrl"}
    for name, agent_class in (("dsrl_na", DSRL), ("dsrl_sac", SAC)):
        record(name, agent_class, ReplayBufferSamples, Logger, meta, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
