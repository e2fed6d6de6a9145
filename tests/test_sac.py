"""SAC against the recorded PyTorch reference (losses, gradients, a whole run), and its compiled update."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.algorithms.sac import SAC, SACUpdate, Transitions
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.data.replay import ReplayBuffer
from diffusion_rl.interop.torch_names import load_state_dict, named_parameters, state_dict
from diffusion_rl.networks.critics import CriticObsAct
from diffusion_rl.networks.gaussian import GaussianMLP
from diffusion_rl.policies.gaussian import gaussian_sample

GOLDENS = Path(os.environ.get("DPPO_GOLDEN_DIR", Path(__file__).resolve().parents[1] / "parity_tests" / "goldens"))


def read(case: str) -> tuple[dict, dict[str, np.ndarray]]:
    path = GOLDENS / f"{case}.npz"
    if not path.exists():
        pytest.skip(f"no recording {case} in {GOLDENS}")
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
    names = dict(zip(meta["arg_names"], args, strict=True))
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
        buffer.append((obs[0], following, actions[0], env["env.reward"][itr][0], env["env.terminated"][itr][0]))
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


def small_update(seed: int) -> SACUpdate:
    with initial_weights(NoiseSource(seed)):
        model = SAC(GaussianMLP(2, 1, 3, [8], tanh_output=False), CriticObsAct(3, [8], 2), horizon_steps=1)
    return SACUpdate(model, gamma=0.9, actor_lr=1e-2, critic_lr=1e-2, target_ema_rate=0.1, target_entropy=-2.0)


def test_the_compiled_call_equals_single_steps():
    cycles, critic_steps, actor_steps, rows = 3, 1, 1, 5
    noise = NoiseSource(0)
    lead = (cycles, critic_steps, rows)
    batches = Transitions(
        *(tf.constant(noise.normal((*lead, *shape))) for shape in ((1, 3), (1, 3), (1, 2), (), ())),
    )
    critic_noise = tf.constant(noise.normal((*lead, 2)))
    actor_noise = tf.constant(noise.normal((cycles, actor_steps, 2, rows, 2)))
    compiled, plain = small_update(1), small_update(1)
    result = compiled.run(batches, critic_noise, actor_noise)
    for u in range(cycles):
        for c in range(critic_steps):
            alpha = plain.alpha
            batch = Transitions(*(x[u, c] for x in batches))
            plain.critic_step(batch, alpha, critic_noise[u, c])
        for p in range(actor_steps):
            plain.actor_step(batch.obs, alpha, actor_noise[u, p])
    np.testing.assert_allclose(result["alpha"], plain.alpha, rtol=1e-6)
    expected = state_dict(plain.model)
    for name, value in state_dict(compiled.model).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
    compiled.run(batches, critic_noise, actor_noise)
    assert compiled.run.experimental_get_tracing_count() == 1


def test_log_probability_of_a_squashed_sample():
    # x = 0.5 + 2 * 0.25 = 1, a = tanh(1); log N(1; 0.5, 2) - log(1 - a^2 + 1e-6)
    action, log_prob = gaussian_sample(tf.constant([[0.5]]), tf.constant([[2.0]]), tf.constant([[0.25]]), 10.0, True)
    density = -0.5 * 0.25**2 - np.log(2) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(action, [[np.tanh(1)]], rtol=1e-6)
    np.testing.assert_allclose(log_prob, [density - np.log(1 - np.tanh(1) ** 2 + 1e-6)], rtol=1e-6)
    clipped, _ = gaussian_sample(tf.constant([[0.0]]), tf.constant([[1.0]]), tf.constant([[50.0]]), 3.0, False)
    assert float(clipped[0, 0]) == 3.0


@pytest.mark.parametrize("kwargs", [{}, {"fixed_std": 0.2}, {"fixed_std": 0.2, "learn_fixed_std": True}])
def test_gaussian_network_standard_deviations(kwargs):
    network = GaussianMLP(2, 3, 4, [8, 8], std_min=0.05, std_max=0.1, **kwargs)
    mean, std = network({"state": tf.ones([5, 1, 4])})
    assert mean.shape == std.shape == (5, 6)
    if kwargs.get("learn_fixed_std"):
        np.testing.assert_allclose(std, 0.1, rtol=1e-6)  # clamped
    elif kwargs:
        np.testing.assert_allclose(std, 0.2)
    else:
        assert (std.numpy() > 0.05).all() and (std.numpy() < 0.1).all()


def test_replay_buffer_overwrites_the_oldest():
    buffer = ReplayBuffer(4, (1, 2), (1, 1))
    for i in range(3):
        rows = np.full(2, float(i))
        buffer.add(rows[:, None, None] * np.ones((1, 1, 2)), rows[:, None, None], rows[:, None, None], rows, rows > 1)
    assert buffer.size == 4 and buffer.rewards.tolist() == [2, 2, 1, 1] and buffer.terminated.tolist() == [1, 1, 0, 0]
    obs, _, _, rewards, _ = buffer.gather(np.array([[0, 2], [1, 3]]))
    assert obs.shape == (2, 2, 1, 2) and rewards.tolist() == [[2, 1], [2, 1]]
