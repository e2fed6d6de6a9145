"""Diffuser's pieces by hand-worked cases: what stays known, weights of the loss, guidance, averages, aggregation."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.core.ema import AVERAGE, COPY, KEEP
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import keras
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.data.episodes import Episodes
from diffusion_rl.data.trajectories import TrajectoryDataset
from diffusion_rl.diffusion.guidance import Guide, best_first
from diffusion_rl.diffusion.inpainting import Known
from diffusion_rl.methods.diffuser.action_only import ActionDiffusion, aggregate
from diffusion_rl.methods.diffuser.model import Diffuser, TrajectoryDiffusion
from diffusion_rl.methods.diffuser.trainer import DiffuserTrainer
from diffusion_rl.networks.layers import Linear
from diffusion_rl.networks.temporal_unet import ActionTemporalUnet

H, O, A, T = 4, 3, 2, 5  # noqa: E741
DRAW = NoiseSource(3)


class Small(keras.layers.Layer):
    """A network of one matrix and the time."""

    def __init__(self, width=A + O):
        super().__init__()
        self.linear = Linear(width, width)

    def call(self, x, time):
        return self.linear(x) + 0.1 * tf.cast(time, x.dtype)[:, None, None]


def model(**options):
    return TrajectoryDiffusion(Small(), H, O, A, T, **{"loss_type": "l2", "predict_epsilon": False} | options)


def conditions(batch, times=(0, H - 1)):
    return {t: tf.constant(DRAW.normal((batch, O))) for t in times}


def noise(batch):
    return tf.constant(DRAW.normal((T + 1, batch, H, A + O)))


def test_known_entries_are_known_after_every_step():
    known = conditions(3)
    chain = model().sample(known, noise(3), with_chain=True).chains
    assert chain.shape == (3, T + 1, H, A + O)
    for t, observation in known.items():
        for step in range(T + 1):
            np.testing.assert_array_equal(chain[:, step, t, A:], observation)
    assert not np.array_equal(chain[:, 0, 0, :A], chain[:, -1, 0, :A])


def test_nothing_is_known_of_predicted_noise():
    """The reference overwrites it with observations (issue 67 there): then no error could be zero."""
    diffusion = model(predict_epsilon=True)
    diffusion.model = lambda x, t: drawn
    x, known, t = tf.zeros([2, H, A + O]), conditions(2), tf.constant([1, 4])
    drawn = tf.constant(DRAW.normal((2, H, A + O)))
    assert float(diffusion.loss(x, known, t, drawn)[0]) == 0


def test_weights_of_the_loss():
    weights = model(action_weight=10, loss_discount=0.5, loss_weights={1: 3.0}).loss_weights
    by_time = np.array([1, 0.5, 0.25, 0.125]) / np.mean([1, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(weights[0, :A], 10)
    np.testing.assert_allclose(weights[1:, :A], np.repeat(by_time[1:, None], A, axis=1), rtol=1e-6)
    np.testing.assert_allclose(weights[:, A:], by_time[:, None] * [1, 3, 1], rtol=1e-6)


@pytest.mark.parametrize("by_variance", [True, False])
def test_guidance_by_a_quadratic_value(by_variance):
    """V = -|x|^2 / 2 has the gradient -x: a step multiplies x by 1 - scale (or 1 - scale * variance)."""
    guide = Guide(lambda x, t: -tf.reduce_sum(x * x, axis=[1, 2]) / 2, 0.1, 2, 2, by_variance)
    x, t = tf.constant(DRAW.normal((3, H, A + O))), tf.constant([1, 2, 4])
    variance = tf.constant([0.5, 0.25, 2.0])[:, None, None]
    moved, values = guide.ascend(x, t, variance, lambda x: x)
    factor = 1 - 0.1 * (variance.numpy() if by_variance else np.ones((3, 1, 1)))
    factor[0] = 1  # below t_stopgrad
    np.testing.assert_allclose(moved, x * factor**2, rtol=1e-5)
    np.testing.assert_allclose(values, -np.sum((x * factor) ** 2, axis=(1, 2)) / 2, rtol=1e-5)


def test_guidance_leaves_known_entries():
    known = Known.of({0: tf.ones([2, O])}, H, A, tf.zeros([2, H, A + O]))
    guide = Guide(lambda x, t: tf.reduce_sum(x, axis=[1, 2]), scale=1.0, scale_grad_by_std=False)
    moved, _ = guide.ascend(known.put(tf.zeros([2, H, A + O])), tf.zeros([2], tf.int32), tf.ones([2, 1, 1]), known.put)
    np.testing.assert_array_equal(moved[:, 0, A:], 1)
    np.testing.assert_array_equal(moved[:, 1:], 1)


def test_the_best_come_first_and_equals_keep_their_order():
    values, rows = best_first(tf.constant([1.0, 3.0, 1.0, 2.0, 2.0, 5.0]), tf.range(6), groups=2)
    assert values.numpy().tolist() == [3, 1, 1, 5, 2, 2] and rows.numpy().tolist() == [1, 0, 2, 5, 3, 4]


def dataset(**options):
    lengths = np.array([9, 7])
    rows = lengths.sum()
    episodes = Episodes(DRAW.normal((rows, O)), DRAW.uniform((rows, A)), lengths, DRAW.normal((rows,)))
    return TrajectoryDataset(episodes, H, "GaussianNormalizer", max_path_length=20, **options)


@pytest.mark.parametrize(("use_padding", "count"), [(True, 8 + 6), (False, 5 + 3)])
def test_windows(use_padding, count):
    data = dataset(use_padding=use_padding)
    assert len(data) == count
    last = data.trajectories(np.array([7 if use_padding else 4]))[0]  # begins at step 7 of 9, or at step 4
    zero = np.concatenate(
        [data.normalizers[k].normalize(np.zeros(n)) for k, n in (("actions", A), ("observations", O))]
    )
    np.testing.assert_array_equal(np.isclose(last, zero).all(axis=1), [False, False, *[use_padding] * 2])


def test_micro_batches_merged_are_the_same_step():
    data = dataset()
    batches = [(np.arange(i, i + 3), np.array([0, 2, 4]), DRAW.normal((3, H, A + O))) for i in (0, 3)]
    joined = tuple(np.concatenate(column) for column in zip(*batches, strict=True))
    found = []
    for merged in (True, False):
        trainer = DiffuserTrainer(model(action_weight=10), data, 1e-2, 0.9)
        for variable in trainer.variables:
            variable.assign(np.linspace(-1, 1, variable.shape.num_elements()).reshape(variable.shape))
        losses, _ = trainer.steps([joined], 0) if merged else trainer.step(batches, 0)
        found.append([losses.mean(), *(v.numpy() for v in trainer.variables)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_average_is_a_copy_at_first():
    trainer = DiffuserTrainer(model(), dataset(), 1e-2, 0.9, step_start_ema=4, update_ema_every=2)
    assert [trainer.averaging(step) for step in range(6)] == [COPY, KEEP, COPY, KEEP, AVERAGE, KEEP]


def test_aggregation():
    actions = DRAW.normal((2, 5, H, A))
    np.testing.assert_allclose(aggregate(actions, "mean"), actions.mean(axis=1))
    np.testing.assert_array_equal(aggregate(actions, "first"), actions[:, 0])
    far = np.concatenate([actions[:, :1] + 100, actions[:, 1:2], actions[:, 1:2] + 0.1, actions[:, 1:2] - 0.1], axis=1)
    np.testing.assert_array_equal(aggregate(far, "medoid"), far[:, 1])
    np.testing.assert_allclose(aggregate(far, "median"), np.median(far, axis=1))
    with pytest.raises(UserError, match="choose mean"):
        aggregate(actions, "most")


def actions_only():
    return ActionDiffusion(ActionTemporalUnet(H, A, O, dim=8, dim_mults=(1,)), H, O, A, T, predict_epsilon=False)


def test_samples_of_actions_depend_on_the_observation():
    diffusion, drawn = actions_only(), tf.constant(DRAW.normal((T + 1, 2, H, A)))
    one, other = (diffusion.sample({0: tf.fill([2, O], value)}, drawn).trajectories for value in (0.0, 1.0))
    assert one.shape == (2, H, A) and not np.allclose(one, other)


def test_actions_alone_cannot_be_guided_nor_weighted_by_observation():
    with pytest.raises(UserError, match="plan_unguided"):
        Diffuser(actions_only(), {}, Guide(lambda x, t: x[:, 0, 0]))
    with pytest.raises(UserError, match="loss_weights"):
        ActionDiffusion(Small(A), H, O, A, T, loss_weights={0: 2.0})


@pytest.mark.parametrize(("observation_dim", "count"), [(11, 565), (17, 1315)])
def test_parameters_of_the_observation_encoder(observation_dim, count):
    network = ActionTemporalUnet(H, A, observation_dim, dim=8, dim_mults=(1,))
    layers = [layer for layer in network.obs_mlp if isinstance(layer, Linear)]
    assert sum(v.shape.num_elements() for layer in layers for v in (layer.kernel, layer.bias)) == count


def test_the_mean_of_many_samples_varies_less():
    """Untrained, in an environment alone: the deviation of the mean of 64 samples is an eighth of a sample's."""
    planner = Diffuser(model(), dataset().normalizers, batch_size=64)
    firsts = planner.act({0: np.zeros((40, O))}, planner.draw(NoiseSource(0), 40)).actions[:, :, 0]
    ratio = firsts.mean(axis=1).std(axis=0) / firsts.std(axis=(0, 1))
    np.testing.assert_allclose(ratio, 1 / 8, rtol=0.35)
