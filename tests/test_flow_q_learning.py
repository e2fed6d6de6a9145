"""Off-policy algorithms of flows by hand: what a steered policy does, what FQL's losses are, chunks as transitions."""

import numpy as np
import pytest
import tensorflow as tf
from tests.small_runs import make_data

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.data.sequences import ChunkDataset
from diffusion_rl.methods.off_policy.dsrl import DSRL
from diffusion_rl.methods.off_policy.fql import FQL, BestOfFlow
from diffusion_rl.networks.critics import CriticObsAct
from diffusion_rl.networks.flow import FlowMLP, OneStepMLP
from diffusion_rl.networks.gaussian import GaussianMLP
from diffusion_rl.networks.mlp import DiffusionMLP
from diffusion_rl.policies.diffusion import DiffusionPolicy
from diffusion_rl.policies.flow import FlowPolicy

H, A, O = 3, 2, 4  # noqa: E741
SIZES = {"horizon_steps": H, "obs_dim": O, "action_dim": A}
SMALL = {"action_dim": A, "horizon_steps": H, "cond_dim": O}


def critic():
    return CriticObsAct(O, [8, 8], A, H, activation_type="ReLU")


def steered(network=None, **changes):
    network = network or FlowMLP(**SMALL, mlp_dims=[8, 8], time_dim=4)
    actor = GaussianMLP(**SMALL, mlp_dims=[8, 8], tanh_output=False, std_min=0.1, std_max=2.0)
    return DSRL(critic=critic(), network=network, noise_actor=actor, **SIZES, **changes)


def drawn(rng, *shape):
    return tf.constant(rng.normal(shape, np.float64))


def test_a_steered_policy_is_the_frozen_one_at_the_chosen_noise():
    rng = NoiseSource(0)
    with precision("float64"), initial_weights(NoiseSource(1)):
        flow = FlowMLP(**SMALL, mlp_dims=[8, 8], time_dim=4)
        diffusion = DiffusionMLP(**SMALL, mlp_dims=[8, 8], time_dim=4)
        ddim = {"denoising_steps": 6, "use_ddim": True, "ddim_steps": 3}
        cond, noise = {"state": drawn(rng, 5, 1, O)}, drawn(rng, 5, H, A)
        whole = tf.concat([noise[None], tf.zeros([3, 5, H, A], tf.float64)], axis=0)
        frozen = {
            "flow": FlowPolicy(flow, H, O, A, inference_steps=2).sample(cond, noise),
            "diffusion": DiffusionPolicy(diffusion, H, O, A, **ddim).sample(cond, whole),
        }
        for sampler, network, sampling in (("flow", flow, {"inference_steps": 2}), ("diffusion", diffusion, ddim)):
            policy = steered(network, sampler=sampler, sampling=sampling)
            expected = frozen[sampler].trajectories
            np.testing.assert_allclose(policy.steered(cond, noise), expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(policy.sample(cond, noise).trajectories, expected, rtol=0, atol=1e-12)
            policy.steering.assign(1.0)
            chosen = policy.steer(cond, tf.reshape(noise, [5, H * A]), deterministic=True)[0]
            assert np.all(np.abs(chosen) <= policy.noise_bound)
            np.testing.assert_array_equal(policy.sample(cond, noise).trajectories, policy.steered(cond, chosen))


def test_values_of_noise_are_values_of_the_actions_that_it_leads_to():
    rng = NoiseSource(0)
    with precision("float64"), initial_weights(NoiseSource(1)):
        policy = steered(sampling={"inference_steps": 2})
        obs, noise = drawn(rng, 6, 1, O), drawn(rng, 6, H, A)
        cond = {"state": obs}
        scaled = policy.noise_critic(cond, noise / policy.noise_bound)
        pairs = zip(scaled, policy.critic(cond, policy.steered(cond, noise)), strict=True)
        expected = sum(np.mean(np.square(q - target)) for q, target in pairs) / 2
        np.testing.assert_allclose(policy.loss_noise_critic(obs, noise), expected, rtol=1e-12)
        with tf.GradientTape() as tape:
            loss = policy.loss_noise_critic(obs, noise)
        assert all(g is None for g in tape.gradient(loss, policy.critic.trainable_variables))
        alone = steered(noise_aliased=False)
        alone.steering.assign(1.0)
        explored = alone.act(cond, {"noise": noise}, False, {})
        used = alone.noise_bound * explored[:, H:]
        np.testing.assert_allclose(explored[:, :H], alone.steered(cond, used), rtol=0, atol=1e-12)


def test_the_losses_of_flow_q_learning_by_hand():
    rng = NoiseSource(0)
    with precision("float64"), initial_weights(NoiseSource(1)):
        actor, flow = OneStepMLP(**SMALL, mlp_dims=[8, 8]), FlowMLP(**SMALL, mlp_dims=[8, 8], time_dim=4)
        policy = FQL(actor=actor, flow=flow, critic=critic(), flow_steps=3, alpha=7.0, q_agg="min", **SIZES)
        obs, noise = drawn(rng, 6, 1, O), drawn(rng, 6, H, A)
        cond = {"state": obs}
        direct = tf.reshape(actor.mlp_mean(tf.concat([tf.reshape(noise, [6, -1]), obs[:, 0]], axis=1)), [6, H, A])
        np.testing.assert_allclose(policy.decided(cond, noise), direct, rtol=0, atol=1e-12)
        acted = FlowPolicy.sample(policy, cond, noise).trajectories
        np.testing.assert_allclose(acted, np.clip(direct, -1, 1), rtol=0, atol=1e-12)
        x = noise
        for i in range(3):
            x = x + flow(x, tf.fill([6], tf.constant(i / 3, tf.float64)), cond) / 3
        goal, q = np.clip(x, -1, 1), policy.critic(cond, np.clip(direct, -1, 1))
        expected = 7 * np.mean(np.square(direct - goal)) - np.mean([q[0], q[1]])
        np.testing.assert_allclose(policy.loss_actor(obs, noise), expected, rtol=1e-12)
        actions, rewards, ended = drawn(rng, 6, H, A), drawn(rng, 6), tf.constant([0.0, 1, 0, 0, 1, 0], tf.float64)
        batch = Transitions(obs, actions, obs, rewards, ended)
        value = np.minimum(*policy.critic_target(cond, np.clip(direct, -1, 1)))
        np.testing.assert_allclose(policy.next_value(obs, noise), value, rtol=1e-12)
        target = rewards + 0.9 * (1 - ended) * value
        errors = [np.mean(np.square(q - target)) for q in policy.critic(cond, actions)]
        np.testing.assert_allclose(policy.loss_critic(batch, 0.9, tf.constant(value)), np.mean(errors), rtol=1e-12)


def test_the_best_of_several_samples():
    rng = NoiseSource(0)
    with precision("float64"), initial_weights(NoiseSource(1)):
        flow = FlowMLP(**SMALL, mlp_dims=[8, 8], time_dim=4)
        policy = BestOfFlow(flow=flow, critic=critic(), n_candidates=4, flow_steps=2, **SIZES)
        cond, noise = {"state": drawn(rng, 5, 1, O)}, drawn(rng, 5, 4, H, A)
        chosen = policy.chosen(cond, noise).numpy()
        samples = np.stack([policy.carried(cond, noise[:, i]) for i in range(4)], axis=1)
        values = np.stack([np.mean(policy.critic(cond, samples[:, i]), axis=0) for i in range(4)], axis=1)
        np.testing.assert_allclose(chosen, samples[np.arange(5), values.argmax(axis=1)], rtol=0, atol=1e-12)


def test_transitions_of_whole_chunks(tmp_path):
    """Five episodes of 40 steps with a reward of 1 in each; the first one ends, the others are cut."""
    path = make_data(tmp_path / "train.npz", O, A)
    arrays = dict(np.load(path))
    arrays["terminals"][39] = True
    np.savez(path, **arrays)
    data = ChunkDataset(path, horizon_steps=H)
    rows = data.gather(np.arange(len(data)))
    assert len(data) == 38 + 4 * 37 and np.all(rows.rewards == H)
    assert rows.dones[:, 0].nonzero()[0].tolist() == [37]
    starts = data.indices[:, 0]
    inside = np.arange(len(data)) != 37
    np.testing.assert_array_equal(rows.conditions["next_state"][inside, 0], data.states[starts[inside] + H])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: steered(sampler="ddpm"), "model.sampler=ddpm: take one of flow, shortcut, diffusion"),
        (lambda: steered(sampler="diffusion"), "model.sampling.use_ddim=true is needed"),
        (lambda: FQL(actor=None, flow=None, critic=None, q_agg="max", **SIZES), "model.q_agg=max: take one of min"),
        (lambda: BestOfFlow(flow=None, critic=None, n_candidates=0, **SIZES), "model.n_candidates=0: at least one"),
    ],
)
def test_mistakes(build, message):
    with pytest.raises(UserError, match=message):
        build()
