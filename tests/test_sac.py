"""SAC's losses against the recorded PyTorch reference, its compiled update against single steps, and one whole run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.algorithms.sac import SAC, SACUpdate, Transitions
from diffusion_rl.core.keras import precision
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.networks.critics import CriticObsAct
from diffusion_rl.networks.gaussian import GaussianMLP

GOLDENS = Path(__file__).resolve().parents[1] / "parity_tests" / "goldens"


def read(case: str) -> tuple[dict, dict[str, np.ndarray]]:
    path = GOLDENS / f"{case}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not shipped")
    with np.load(path) as z:
        return json.loads(str(z["meta"])), {k: z[k] for k in z.files if k != "meta"}


def group(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k[len(prefix) + 1 :]: v for k, v in arrays.items() if k.startswith(prefix + "/")}


def build(meta: dict, weights: dict[str, np.ndarray]) -> SAC:
    kwargs = dict(meta["spec"]["kwargs"])
    actor = GaussianMLP(**kwargs.pop("actor")["kwargs"])
    critic = CriticObsAct(**kwargs.pop("critic")["kwargs"])
    model = SAC(actor, critic, **kwargs)
    load_state_dict(model, weights)
    return model


@pytest.mark.parametrize("which", ["critic", "actor", "temperature"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-10)])
def test_losses_and_gradients_equal_the_reference(which, dtype, tolerance):
    meta, arrays = read(f"sac_loss_{which}")
    with precision(dtype):
        model = build(meta, group(arrays, "w"))
    inputs = {k: tf.constant(v.astype(dtype)) for k, v in group(arrays, "in").items()}
    args = [inputs[a[4:]] if isinstance(a, str) and a.startswith("@in/") else a for a in meta["args"]]
    names = dict(zip(meta["arg_names"], args, strict=True)) | {
        k: inputs[v[4:]] for k, v in meta["kwargs"].items() if isinstance(v, str)
    } | {k: v for k, v in meta["kwargs"].items() if not isinstance(v, str | dict)}
    obs, noise = inputs["obs.state"], inputs["draw_000"]
    with tf.GradientTape() as tape:
        if which == "critic":
            batch = Transitions(obs, inputs["next_obs.state"], names["actions"], names["rewards"], names["terminated"])
            loss = model.loss_critic(batch, names["gamma"], names["alpha"], noise)
        elif which == "actor":
            loss = model.loss_actor(obs, names["alpha"], noise)
        else:
            loss = model.loss_temperature(obs, names["alpha"], names["target_entropy"], noise)
    suffix = "64" if dtype == "float64" else ""
    np.testing.assert_allclose(loss, arrays[f"out{suffix}/loss"], rtol=tolerance)
    if not meta["with_grad"]:
        return
    expected = group(arrays, f"grad{suffix}")
    from diffusion_rl.interop.torch_names import named_parameters

    largest = max(np.abs(g).max() for g in expected.values())
    parameters = list(named_parameters(model))
    grads = tape.gradient(loss, [v for _, v, _ in parameters])
    for (name, _, transposed), grad in zip(parameters, grads, strict=True):
        if name in meta["grad_none"]:
            assert grad is None, name
        elif name in expected:
            found = grad.numpy().T if transposed else grad.numpy()
            np.testing.assert_allclose(found, expected[name], atol=tolerance * largest, err_msg=name)


def test_target_update_equals_the_reference():
    meta, arrays = read("sac_update_target")
    model = build(meta, group(arrays, "w"))
    model.update_target_critic(meta["args"][0])
    found = state_dict(model)
    for name, expected in group(arrays, "out").items():
        np.testing.assert_allclose(found[name.removeprefix("state.")], expected, rtol=1e-6, atol=1e-8)


def test_a_whole_run_of_the_reference_agent():
    """agent_sac: 12 iterations of one chunk step; a critic step each, two actor steps at every second."""
    meta, arrays = read("agent_sac")
    train = meta["cfg"]["train"]
    with precision("float64"):
        model = build(meta, group(arrays, "w"))
    update = SACUpdate(
        model,
        gamma=train["gamma"],
        actor_lr=train["actor_lr"],
        critic_lr=train["critic_lr"],
        target_ema_rate=train["target_ema_rate"],
        target_entropy=train["target_entropy"],
        init_temperature=train["init_temperature"],
    )
    draws = iter([arrays[d["name"]] for d in meta["draws"]])
    env = group(arrays, "in")
    buffer: list[tuple] = []
    for itr in range(train["n_train_itr"]):
        obs = env["env.reset_obs"][itr].astype(np.float64)  # the environment is reset at every iteration
        actions = model.sample({"state": tf.constant(obs)}, tf.constant(next(draws), tf.float64))[0].numpy()
        np.testing.assert_allclose(actions, arrays["out64/env_actions"][itr], atol=1e-9)
        truncated = env["env.truncated"][itr][0]
        following = env["env.final_obs" if truncated else "env.obs"][itr][0]
        buffer.append(
            (obs[0], following, actions[0], env["env.reward"][itr][0], env["env.terminated"][itr][0])
        )
        if itr == 0:
            continue
        rows = next(draws)
        batch = Transitions(*(tf.constant(np.stack([buffer[i][k] for i in rows]), tf.float64) for k in range(5)))
        alpha = update.alpha
        update.critic_step(batch, alpha, tf.constant(next(draws), tf.float64))
        if itr % 2 == 0:
            for _ in range(2):
                update.actor_step(batch.obs, alpha, tf.constant(np.stack([next(draws), next(draws)]), tf.float64))
        np.testing.assert_allclose(update.log_alpha, arrays["out64/after_itr.log_alpha"][itr], rtol=1e-9)
    found = state_dict(model)
    for name, expected in group(arrays, "out64").items():
        if name.startswith("final."):
            np.testing.assert_allclose(found[name[6:]], expected, atol=1e-8, err_msg=name)
    assert next(draws, None) is None
