"""Records FPO++ from its authors' locomotion code (PyTorch), in double precision.

    python parity_tests/recorders/record_fpo_plus.py CHECKOUT DIR

CHECKOUT is one of amazon-far/fpo-control; what it needs of packages: torch. Of each trust region: the losses of pairs,
one update of three minibatches with the gradients of the first, and actions that begin with zeros. Their bounds on
losses and differences stay at their defaults, which nothing here reaches; errors are means over the action.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from recording import Tape, commit_of, save, weights_like  # noqa: E402

O, A, B, PAIRS, MINIBATCHES, WIDTH, TIMES = 5, 3, 8, 4, 3, 8, 4  # noqa: E741
POLICY: dict[str, Any] = {
    **{"activation": "elu", "actor_hidden_dims": [WIDTH, WIDTH], "critic_hidden_dims": [WIDTH, WIDTH]},
    **{"timestep_embed_dim": TIMES, "actor_mlp_output_scale": 1.0, "cfm_loss_t_inverse_cdf_beta": 1.0},
    **{"sampling_steps": 5, "cfm_loss_reduction": "mean", "actor_scale": 1.0, "action_perturb_std": 0.0},
    **{"training_sampling_steps": None, "actor_final_layer_weight_scale": None},
}
ALGORITHM: dict[str, Any] = {
    **{
        "learning_rate": 3e-3,
        "weight_decay": 1e-2,
        "adam_betas": (0.9, 0.999),
        "ema_decay": 0.0,
        "ema_warmup_steps": 0,
    },
    **{"clip_param": 0.2, "num_learning_epochs": 1, "num_mini_batches": MINIBATCHES, "value_loss_coef": 0.7},
    **{"knn_entropy_coef": 0.0, "knn_entropy_k": 1, "gamma": 0.99, "lam": 0.95, "max_grad_norm": 1e9},
    **{"use_clipped_value_loss": False, "desired_kl": 1e-4, "schedule": "fixed"},
    **{"normalize_advantage_per_mini_batch": False, "normalize_advantage": False, "n_samples_per_action": PAIRS},
    **{"cfm_loss_clamp": 20.0, "cfm_loss_clamp_negative_advantages": True},
    **{"cfm_loss_clamp_negative_advantages_max": 20.0, "cfm_diff_clamp_max": 10.0},
    **{"advantage_clamp": (100.0, 100.0), "storage_action_noise_std": 0.0},
}


class Batches:
    """Stands in the place of the rollouts' storage."""

    def __init__(self, batches: list[dict[str, Any]]):
        self.batches = batches

    def mini_batch_generator(self, *sizes: int) -> Any:
        for batch in self.batches:
            rows = {name: torch.from_numpy(value) for name, value in batch.items()}
            column = {name: rows[name][:, None] for name in ("values", "advantages", "returns")}
            yield (
                *(rows["obs"], rows["obs"], rows["actions"], column["values"], column["advantages"], column["returns"]),
                *(None, rows["old_losses"], rows["noise"], rows["times"][:, :, None], (None, None), None),
            )

    def clear(self) -> None:
        """Does nothing."""


def drawn_batch(seed: int) -> dict[str, np.ndarray]:
    """Draws the rows of a minibatch."""
    rng = np.random.default_rng(seed)
    rows = {name: rng.normal(size=B) for name in ("values", "advantages", "returns")}
    rows |= {"obs": rng.normal(size=(B, O)), "actions": rng.uniform(-1, 1, size=(B, A))}
    return rows | {"noise": rng.normal(size=(B, PAIRS, A)), "times": rng.uniform(size=(B, PAIRS))}


def record(name: str, trust_region: str, meta: dict[str, Any], folder: str) -> None:
    """Writes one case."""
    from isaaclab_fpo.algorithms.fpo import FPO
    from isaaclab_fpo.modules import ActorCritic

    policy = ActorCritic(O, O, A, types.SimpleNamespace(**POLICY))
    policy._compiled_integrate_flow = policy._integrate_flow
    agent = FPO(policy, types.SimpleNamespace(**ALGORITHM, trust_region_mode=trust_region))
    tensors = dict(policy.named_parameters())
    weights = weights_like({key: tuple(p.shape) for key, p in tensors.items()}, 7, lambda key: False)
    for key, parameter in tensors.items():
        parameter.data.copy_(torch.from_numpy(weights[key]))
    batches, losses, rng = [drawn_batch(i) for i in range(MINIBATCHES)], [], np.random.default_rng(5)
    for batch in batches:
        rows = {key: torch.from_numpy(value) for key, value in batch.items()}
        given = (rows["obs"], rows["actions"], rows["noise"], rows["times"][:, :, None])
        losses.append(policy.get_cfm_loss(*given)[0].detach().numpy())
        batch["old_losses"] = losses[-1] + 0.3 * rng.normal(size=losses[-1].shape)
    agent.storage = Batches(batches)
    out: dict[str, Any] = {"pair_losses": losses[0], "acted": policy.act_inference(rows["obs"]).detach().numpy()}
    gradients: dict[str, np.ndarray] = {}
    step = agent.optimizer.step

    def keeping(*args: Any, **kwargs: Any) -> Any:
        for key, parameter in tensors.items():
            gradients.setdefault(key, parameter.grad.numpy().copy())
        return step(*args, **kwargs)

    agent.optimizer.step = keeping
    means = agent.update()
    out |= {key: np.float64(means[key]) for key in ("surrogate_loss", "value_loss")}
    out |= {f"final.{key}": parameter.detach().numpy() for key, parameter in tensors.items()}
    given = {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}
    names = ("clip_param", "learning_rate", "weight_decay", "value_loss_coef")
    config = {key: ALGORITHM[key] for key in names} | {"trust_region": trust_region}
    config |= {"sampling_steps": POLICY["sampling_steps"], "time_dim": TIMES}
    save(folder, name, {**meta, "config": config}, Tape(0), given, w=weights, out64=out, grad64=gradients)


def main(checkout: str, folder: str) -> None:
    sys.path.insert(0, str(Path(checkout) / "isaaclab_experiments" / "isaaclab_fpo"))
    sys.modules.setdefault("git", types.ModuleType("git"))  # for what is said of a run
    torch.set_default_dtype(torch.float64)
    meta = {"repository": "amazon-far/fpo-control", "commit": commit_of(checkout), "runner": "fpo_plus"}
    meta["class_path"] = "isaaclab_fpo.algorithms.fpo.FPO"
    for name, trust_region in (("fpo_plus_clip", "ppo"), ("fpo_plus_asymmetric", "aspo")):
        record(name, trust_region, meta, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
