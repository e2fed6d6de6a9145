"""Dropout in supervised training of Gaussian policies: masks are drawn when training and only then."""

import numpy as np

from diffusion_rl import app
from diffusion_rl.configs import compose
from diffusion_rl.loops.offline import PreTraining

GAUSSIAN = "gym/pretrain/hopper-medium-v2/pre_gaussian_mlp"
PLAIN = ["model.network.mlp_dims=[16,16]", "++model.network.residual_style=false", "train.batch_size=32"]


def pre_training(tmp_path, *overrides):
    overrides = [*PLAIN, "train.n_epochs=1", "+tensorboard=false", f"logdir={tmp_path}", *overrides]
    composed = compose(GAUSSIAN, overrides)
    del composed.hydra
    return PreTraining(app.prepare(composed))


def test_masks_are_drawn_in_training_at_the_rate_and_not_in_validation(tmp_path):
    loop = pre_training(tmp_path, "+model.network.dropout=0.25")
    _, masks = loop._draw((50, 32), loop.noise)
    assert masks.shape == (50, 32, 32) and set(np.unique(masks)) == {0, 1} and abs(masks.mean() - 0.75) < 0.01
    assert loop._draw((50, 32), loop.noise, training=False)[1].shape[-1] == 0
    assert pre_training(tmp_path)._draw((50, 32), loop.noise)[1].shape[-1] == 0


def test_the_masks_reach_the_network(tmp_path):
    """Keeping everything scales by 1 / (1 - rate); keeping nothing leaves the biases."""
    loop = pre_training(tmp_path, "+model.network.dropout=0.5")
    trainer, items = loop.trainer, loop.items[:32]
    batch = trainer.batch(items, np.zeros(32, np.int32), np.zeros((32, 32), np.float32))
    without = trainer.batch(items, np.zeros(32, np.int32), np.zeros((32, 0), np.float32))
    kept = trainer.batch(items, np.zeros(32, np.int32), np.ones((32, 32), np.float32))
    losses = [float(trainer.loss(b)) for b in (batch, without, kept)]
    assert len(set(losses)) == 3 and np.isfinite(losses).all()
    loop.run()
