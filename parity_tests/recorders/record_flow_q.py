"""Records flow Q-learning and Q-chunking from their authors' agents (JAX), in double precision.

    python parity_tests/recorders/record_flow_q.py CHECKOUT DIR

CHECKOUT is one of seohongpark/fql or of ColinQiyangLi/qc; what it needs of packages: jax, flax, optax, distrax,
ml_collections. Of each agent: its losses, gradients and samples at drawn weights, then three updates.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from recording import Tape, commit_of, save, weights_like  # noqa: E402

O, A, H, B, UPDATES, CANDIDATES = 5, 3, 2, 8, 3, 4  # noqa: E741
SMALL = {
    **{"actor_hidden_dims": (8, 8), "value_hidden_dims": (8, 8), "flow_steps": 4, "lr": 3e-3, "tau": 0.05},
    **{"alpha": 3.0, "discount": 0.9},
}
FQL = {
    "fql_mean": {"q_agg": "mean", "normalize_q_loss": False},
    "fql_min_normalized": {"q_agg": "min", "normalize_q_loss": True},
}
CHUNKS = {"horizon_length": H, "action_chunking": True}
QC = {
    "qc_distilled": {**CHUNKS, "q_agg": "min", "actor_type": "distill-ddpg"},
    "qc_best_of_n": {**CHUNKS, "q_agg": "mean", "actor_type": "best-of-n", "actor_num_samples": CANDIDATES},
}


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree of parameters by dotted names."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in pairs}


def replaced(tree: Any, leaves: dict[str, np.ndarray]) -> Any:
    """Returns the tree with other leaves."""

    def leaf(path: Any, _: Any) -> Any:
        return jax.numpy.asarray(leaves[".".join(str(key.key) for key in path)])

    return jax.tree_util.tree_map_with_path(leaf, tree)


def drawn_batch(seed: int, chunks: bool) -> dict[str, np.ndarray]:
    """Draws the rows of one update; of chunks the rewards are those up to each step."""
    rng = np.random.default_rng(seed)
    steps = (H,) if chunks else ()
    batch = {
        "observations": rng.normal(size=(B, O)),
        "actions": rng.uniform(-1, 1, size=(B, *steps, A)),
        "next_observations": rng.normal(size=(B, *steps, O)),
        "rewards": rng.normal(size=(B, *steps)),
        "masks": (rng.uniform(size=(B, *steps)) < 0.7).astype(np.float64),
    }
    return batch | ({"valid": np.ones((B, H))} if chunks else {})


def record(agent_class: Any, config: Any, name: str, chosen: dict[str, Any], meta: dict[str, Any], folder: str) -> None:
    """Writes one case."""
    chunks = "horizon_length" in chosen
    config.update({**SMALL, **chosen})
    batches = [drawn_batch(i, chunks) for i in range(UPDATES)]
    observation, action = batches[0]["observations"], batches[0]["actions"].reshape(B, -1)[:, :A]
    example = (observation[0], action[0]) if chunks else (observation, action)
    agent = agent_class.create(0, *example, config)
    shapes = {key: value.shape for key, value in flat(agent.network.params).items()}
    weights = weights_like(shapes, 7, lambda key: key.endswith("scale"))
    network = type(agent.network).create(
        agent.network.model_def, replaced(agent.network.params, weights), tx=agent.network.tx
    )
    agent = agent.replace(network=network)
    tape = Tape(11)
    jax.random.normal = lambda key, shape=(), dtype=float: jax.numpy.asarray(tape.take("normal", shape))
    jax.random.uniform = lambda key, shape=(), dtype=float: jax.numpy.asarray(tape.take("uniform", shape))
    key = agent.rng
    out: dict[str, Any] = {}
    with jax.disable_jit():
        # the losses play the draws of the first update
        (_, info), grads = jax.value_and_grad(
            lambda params: agent.total_loss(batches[0], params, rng=key), has_aux=True
        )(agent.network.params)
        out |= {f"first.{key.replace('/', '.')}": value for key, value in info.items()}
        tape.rewind()
        out["actions"] = agent.sample_actions(batches[0]["observations"], key)
        noise = tape.kept[1][1]
        tape.rewind()
        out["flow_actions"] = agent.compute_flow_actions(batches[0]["observations"], noise)
        for i, batch in enumerate(batches):
            agent, info = agent.update(batch)
            out |= {f"update{i}.{key.replace('/', '.')}": value for key, value in info.items()}
    out |= {f"final.{key}": value for key, value in flat(agent.network.params).items()}
    given = {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}
    gradients = {key: value for key, value in flat(grads).items() if "target" not in key}
    settings = {**SMALL, **chosen, "updates": UPDATES, "draws_per_update": len(tape.kept) // UPDATES}
    meta = {**meta, "runner": "flow_q", "config": settings}
    save(folder, name, meta, tape, given, w=weights, out64=out, grad64=gradients)


def main(checkout: str, folder: str) -> None:
    jax.config.update("jax_enable_x64", True)
    sys.path.insert(0, checkout)
    random = jax.random.normal, jax.random.uniform
    if (Path(checkout) / "agents" / "acfql.py").exists():
        from agents.acfql import ACFQLAgent as Agent
        from agents.acfql import get_config

        repository, cases = "ColinQiyangLi/qc", QC
    else:
        from agents.fql import FQLAgent as Agent
        from agents.fql import get_config

        repository, cases = "seohongpark/fql", FQL
    path = f"{Agent.__module__}.{Agent.__name__}"
    meta = {"repository": repository, "commit": commit_of(checkout), "class_path": path, "jax": jax.__version__}
    for name, chosen in cases.items():
        jax.random.normal, jax.random.uniform = random
        record(Agent, get_config(), name, chosen, meta, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
