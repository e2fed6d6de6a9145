"""Dropout of Gaussian and mixture policies, in supervised training and IBRL: masks are drawn in training alone."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.cli import app
from diffusion_rl.config.compose import compose
from diffusion_rl.config.instantiate import instantiate
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.data.replay import ReplayBuffer, fields
from diffusion_rl.methods.off_policy.buffers import Buffers, Rows
from diffusion_rl.methods.pretraining.training import PreTraining
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.mlp import draw_masks, split_masks
from diffusion_rl.networks.transformer import GaussianTransformer, GMMTransformer
from diffusion_rl.policies.gaussian import GaussianPolicy
from diffusion_rl.policies.gmm import GMMPolicy

GAUSSIAN = "gym/pretrain/hopper-medium-v2/pre_gaussian_mlp"
PLAIN = ["model.network.mlp_dims=[16,16]", "++model.network.residual_style=false", "train.batch_size=32"]


def pre_training(tmp_path, *overrides):
    overrides = [*PLAIN, "train.n_epochs=1", "+tensorboard=false", f"logdir={tmp_path}", *overrides]
    composed = compose(GAUSSIAN, overrides)
    del composed.hydra
    return PreTraining(app.prepare(composed))


def test_masks_are_drawn_in_training_at_the_rate_and_not_in_validation(tmp_path):
    loop = pre_training(tmp_path, "+model.network.dropout=0.25")
    _, masks = loop._draw((50, 32), loop.rng)
    assert masks.shape == (50, 32, 32) and set(np.unique(masks)) == {0, 1} and abs(masks.mean() - 0.75) < 0.01
    assert loop._draw((50, 32), loop.rng, training=False)[1].shape[-1] == 0
    assert pre_training(tmp_path)._draw((50, 32), loop.rng)[1].shape[-1] == 0


def test_the_masks_reach_the_network(tmp_path):
    """Keeping everything scales by 1 / (1 - rate); keeping nothing leaves the biases."""
    loop = pre_training(tmp_path, "+model.network.dropout=0.5")
    trainer, items = loop.trainer, loop.items[:32]
    masks = (np.zeros((32, 32), np.float32), np.zeros((32, 0), np.float32), np.ones((32, 32), np.float32))
    t, shifts = np.zeros(32, np.int32), np.zeros((32, 0, 2), np.int32)
    losses = [float(trainer.loss(trainer.batch(items, t, mask, shifts))) for mask in masks]
    assert len(set(losses)) == 3 and np.isfinite(losses).all()
    loop.run()


@pytest.mark.parametrize(("network", "policy"), [(GaussianTransformer, GaussianPolicy), (GMMTransformer, GMMPolicy)])
def test_transformers_draw_masks_at_two_rates_which_reach_them(network, policy):
    """Of both embeddings, and in each layer of two attentions' weights, hidden features and what three parts add."""
    small = {"transformer_embed_dim": 8, "transformer_num_heads": 2, "transformer_num_layers": 1}
    seeing = policy(network(2, 3, 5, p_drop_emb=0.5, p_drop_attn=0.1, **small), 3)
    for kernel in (v for v in variables_of(seeing.network) if v.name.startswith("kernel")):
        kernel.assign(20 * kernel)  # at first memory is next to nothing
    masks = draw_masks(seeing.network, NoiseSource(0), (500,))
    parts = split_masks(seeing.network, tf.constant(masks))
    embedded, layer = [(1, 8), (3, 8)], [(2, 3, 3), (3, 8), (2, 3, 1), (3, 8), (3, 32), (3, 8)]
    assert [tuple(part.shape[1:]) for part in parts] == embedded + layer
    kept = [float(tf.reduce_mean(part)) for part in parts]
    np.testing.assert_allclose(kept, [0.5] * 2 + [0.9] * 6, atol=0.03)
    cond, actions = {"state": tf.ones([500, 1, 5])}, tf.zeros([500, 3, 2])
    others = split_masks(seeing.network, tf.constant(draw_masks(seeing.network, NoiseSource(1), (500,))))
    choices = [[], parts] + [[*parts[:i], others[i], *parts[i + 1 :]] for i in range(len(parts))]
    losses = [float(seeing.loss(actions, cond, ent_coef=0.0, keep_masks=masks)[0]) for masks in choices]
    assert len(set(losses)) == len(losses), "no mask is without effect"
    assert draw_masks(network(2, 3, 5, **small), NoiseSource(0), (4,)).shape == (4, 0)


IBRL = "gym/finetune/kitchen-complete-v0/ibrl_mlp"


def ibrl():
    composed = compose(IBRL, ["model.actor.mlp_dims=[16,16]", "model.critic.mlp_dims=[8,8]", "model.network_path=null"])
    return instantiate(composed.model), composed.train


def test_ibrl_draws_masks_for_every_network_when_training_and_none_when_evaluating():
    model, train = ibrl()
    noise, batch = NoiseSource(0), int(train.batch_size)
    buffer = ReplayBuffer(batch, fields(("obs",), (1, 60), (1, 9)))
    buffer.add(obs=np.zeros((batch, 1, 60)))
    buffer.flush()
    rows = Rows(Buffers(buffer), noise, 1)
    drawn = {
        (2, batch, 32): model.draw_critic(noise, rows, train, True)["keep"],
        (batch, 32): model.draw(noise, rows, train, True)["keep"],
        (2, 50, 32): model.draw_action(noise, 50, False, train)["keep"],
    }
    for shape, keep in drawn.items():
        assert keep.shape == shape and set(np.unique(keep)) == {0, 1} and abs(keep.mean() - 0.5) < 0.03
    assert "keep" not in model.draw_action(noise, 50, True, train)


def test_ibrls_masks_reach_the_networks():
    """With all units dropped an action does not depend on the observation; each network has masks of its own."""
    model, _ = ibrl()
    source = NoiseSource(1)
    cond, noise = {"state": source.normal((3, 1, 60))}, np.zeros((2, 3, 9 * model.horizon_steps), np.float32)
    some, none = np.ones((3, 32), np.float32), np.zeros((3, 32), np.float32)
    imitated, learned = (
        a.numpy() for a in model.proposals(cond, model.target_actor, noise, False, np.stack([none, some]))
    )
    assert np.ptp(imitated, axis=0).max() == 0 and np.ptp(learned, axis=0).max() > 0
    losses = [float(model.loss_actor(cond["state"], noise[0], keep)) for keep in (None, some, none)]
    assert len(set(losses)) == 3
