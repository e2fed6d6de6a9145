"""DiffuserLite in parts: levels, windows, flows, guidance, networks' sizes, returns, accounting, toys."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from parity_tests.replay.scripted import Step

from diffusion_rl.core.ema import ema_update
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.optimizers import AdamW
from diffusion_rl.data.plan_windows import PlanDataset, conditions
from diffusion_rl.diffusion import rectified_flow, vp_flow
from diffusion_rl.methods.diffuser_lite.acting import run_lite_episodes
from diffusion_rl.methods.diffuser_lite.domains import antmaze_targets, kitchen_targets, return_scale
from diffusion_rl.methods.diffuser_lite.levels import Acting, PlanLevel, level_shapes
from diffusion_rl.methods.diffuser_lite.planner import DiffuserLite
from diffusion_rl.methods.diffuser_lite.trainer import InverseTrainer, LevelTrainer, cosine_rate
from diffusion_rl.networks.dit import ConditionalDiT, DiT1d
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.networks.layers import variables_of

NOISE = NoiseSource(7)
ONE_STEP = rectified_flow.steps(np.array([0.0, 1.0]))
SIZE = {"emb_dim": 16, "d_model": 16, "n_heads": 2, "depth": 1}


def flow_steps(n: int) -> rectified_flow.Steps:
    return rectified_flow.steps(rectified_flow.time_grid(n))


def level(states: int = 5, width: int = 3, first: bool = False, drawn: bool = True) -> PlanLevel:
    """A small one; `drawn`: no weight is zero."""
    network = ConditionalDiT(width, **SIZE)
    for variable in variables_of(network) if drawn else ():
        variable.assign_add(0.2 * NOISE.normal(variable.shape))
    return PlanLevel(network, states, width, first)


def flat(lengths: list[int], terminal: list[int], width: int = 3) -> dict[str, np.ndarray]:
    """Episodes of those lengths; the given ones end before their time, the others by a time-out."""
    n, ends = sum(lengths), np.cumsum(lengths) - 1
    arrays = {"observations": NOISE.normal((n, width)), "actions": NOISE.uniform((n, 2), -1, 1)}
    arrays |= {"rewards": NOISE.normal((n,)), "terminals": np.zeros(n, bool), "timeouts": np.zeros(n, bool)}
    for i, end in enumerate(ends):
        arrays["terminals" if i in terminal else "timeouts"][end] = True
    return arrays


# ---------- levels and windows ----------


def test_spans_and_strides():
    assert level_shapes([5, 5, 9]) == [(5, 32, 129), (5, 8, 33), (9, 1, 9)]
    assert level_shapes([4, 5, 5]) == [(4, 16, 49), (5, 4, 17), (5, 1, 5)]


def test_windows_start_everywhere_and_end_before_the_limit():
    data = PlanDataset(flat([30, 12], [1]), "mujoco", [9, 3], 0.99, longest=30)
    assert [len(each) for each in data.windows] == [22 + 12, 28 + 12]  # starts 0 … min(L - 1, 30 - span)


def test_levels_share_a_fraction_of_the_data():
    data = PlanDataset(flat([30, 12], [1]), "mujoco", [9, 3], 0.99, longest=30)
    np.testing.assert_array_equal(data.at(np.array([0, 20, 39])), [[0, 17, 33], [0, 20, 39]])
    missed = [n for n in range(1, 60) if any(int(n * (k / n)) != k for k in range(n))]
    assert {22, 49} <= set(missed), "for some n the product is a little less than k: the reference's arithmetic is kept"


def test_the_last_reward_is_replaced_where_an_episode_ended_before_its_time():
    rows = flat([5, 4], [0])
    data = PlanDataset(rows, "mujoco", [3, 2], 0.5, penalty=-100, longest=6)
    assert data.rewards[4] == -100 and data.rewards[8] == rows["rewards"][8]
    by_hand = sum(0.5**k * data.rewards[1 + k] for k in range(4))
    assert data.returns(1)[1] == pytest.approx(by_hand, rel=1e-6)
    np.testing.assert_allclose(conditions(data, 1, 50.0), data.returns(1) / 50, rtol=1e-6)


def test_rows_of_strided_windows_and_their_padding():
    data = PlanDataset(flat([5, 4], [0]), "mujoco", [5, 3], 0.9, longest=8)
    np.testing.assert_array_equal(data.rows(0, np.array([3]), stride=2), [[3, 9, 9]])  # row 9 is the first padding
    assert not data.states[9].any() and not data.actions[9].any()


def test_kitchen_returns_are_told_by_the_value_at_the_end():
    rows = flat([6], [])
    rows["rewards"] = np.array([0, 0, 1, 1, 2, 2], np.float32)
    data = PlanDataset(rows, "kitchen", [4, 2], 0.5, longest=8)
    values = np.arange(7, dtype=np.float32)
    told = conditions(data, 0, 1.0, values)
    assert told[1] == pytest.approx((0 + 0.5 * 1 / 4 + 0.25 * 1 / 4 + 0.125 * 4) / 100)  # rows 1 … 4, V(row 4) = 4
    assert conditions(data, 1, 1.0, values)[3] == pytest.approx((1 + 2) / 2 / 4)
    with pytest.raises(UserError, match="iql_training"):
        conditions(data, 0, 1.0)


def test_antmaze_returns_are_told_by_how_soon_the_goal_is_reached():
    rows = flat([10], [])
    rows["rewards"] = np.array([0, 0, 0, 1, 1, 0, 0, 0, 0, 0], np.float32)
    rows["terminals"] = rows["rewards"] > 0
    rows["timeouts"] = np.arange(10) == 8
    data = PlanDataset(rows, "antmaze", [4, 3], 0.5, longest=5)
    np.testing.assert_array_equal(data.segments.lengths, [5, 4])
    assert conditions(data, 1, 1.0, np.zeros(12, np.float32))[2] == pytest.approx(1 / 2)  # reached at the second state
    first = conditions(data, 0, 1.0, np.full(12, -7, np.float32))
    assert first[0] == pytest.approx(1 + (-1 - 0.5 - 0.25 + 0.125 * -7) / 100)


# ---------- flow ----------


def test_grids():
    np.testing.assert_allclose(rectified_flow.time_grid(3), [0, 0.19245, 0.54433, 1], atol=5e-6)
    np.testing.assert_allclose(rectified_flow.time_grid(5), [0, 0.08944, 0.25298, 0.46476, 0.71554, 1], atol=5e-6)


@pytest.mark.parametrize("backbone", ["flow", "diffusion"])
def test_known_states_are_exact_after_sampling(backbone):
    planned = PlanLevel(level().network, 5, 3, False, backbone=backbone)
    known = NOISE.normal((4, 5, 3))
    x = planned.sample(NOISE.normal((4, 5, 3)), known, rectified_flow.time_grid(3), tf.ones([4, 1]), 2.0).numpy()
    np.testing.assert_array_equal(x[:, [0, -1]], known[:, [0, -1]])
    assert (x[:, 1:-1] != known[:, 1:-1]).all()


def test_without_a_mask_every_entry_counts():
    """Nothing is known: the plain mean over all states, however many there are."""
    x0, x1 = (tf.constant(NOISE.normal((4, 9, 3))) for _ in range(2))
    plain = PlanLevel(level().network, 9, 3, True)
    plain.mask = plain.weights = None
    t = tf.constant([0.1, 0.4, 0.5, 0.9])
    velocity = plain.network(rectified_flow.interpolate(x0, x1, t), t, None, None)
    np.testing.assert_allclose(plain.loss(x0, x1, t), np.mean((velocity - (x0 - x1)) ** 2), rtol=1e-6)


def test_the_second_state_weighs_more_and_known_ones_nothing():
    errors = [
        float(rectified_flow.loss(lambda x, t, i=i: wrong_at(i), *zeros(), PLANNED.mask, PLANNED.weights))
        for i in range(5)
    ]
    np.testing.assert_allclose(np.array(errors) * 5, [0, 10, 1, 1, 0])


PLANNED = level()


def zeros():
    return tf.zeros([2, 5, 3]), tf.zeros([2, 5, 3]), tf.zeros([2])


def wrong_at(state: int) -> tf.Tensor:
    return tf.one_hot([state], 5)[..., None] * tf.ones([2, 1, 3])


def test_guidance_is_linear_in_its_weight():
    noise, known, told = NOISE.normal((3, 5, 3)), NOISE.normal((3, 5, 3)), tf.constant(NOISE.normal((3, 1)))
    grid = rectified_flow.time_grid(1)
    x0, x1, x2 = (PLANNED.sample(noise, known, grid, told, w).numpy() for w in (0.0, 1.0, 2.0))
    np.testing.assert_allclose(x2, 2 * x1 - x0, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(x0, PLANNED.sample(noise, known, grid).numpy())


def test_a_new_network_does_not_move_and_has_the_published_size():
    x = NOISE.normal((2, 5, 3))
    assert not DiT1d(3, **SIZE)(x, tf.zeros([2])).numpy().any()
    sizes = {11: 2_718_475, 17: 2_721_553}
    for width, size in sizes.items():
        network = DiT1d(width, 256, 256, 8, 2)
        assert sum(int(tf.size(v)) for v in variables_of(network) if v.trainable) == size
        assert sum(int(tf.size(v)) for v in variables_of(network)) == size + 32


def test_one_step_is_enough_for_a_straight_flow():
    """Data are one point p: x_t = p + t (x1 - p), so the velocity at x_t is (p - x_t) / t and one step ends in p."""
    p = tf.constant([2.0, -1.0, 0.5])
    x = rectified_flow.sample(lambda x, t: (p - x) / t[:, None, None], NOISE.normal((6, 1, 3)), ONE_STEP)
    np.testing.assert_allclose(x[:, 0], np.tile(p, (6, 1)), atol=1e-6)


def test_reflow_makes_one_step_better_than_it_was():
    """Two points in the plane, a small perceptron. Before the reflow one step from noise ends between the points."""
    source = NoiseSource(3)
    weights = [tf.Variable(source.normal(shape) / 4) for shape in ((3, 64), (64,), (64, 64), (64,), (64, 2), (2,))]

    def velocity(x, t):
        h = tf.concat([x[:, 0], t[:, None]], axis=-1)
        for i in (0, 2):
            h = tf.nn.silu(tf.matmul(h, weights[i]) + weights[i + 1])
        return (tf.matmul(h, weights[4]) + weights[5])[:, None]

    optimizer = AdamW(weights, 3e-3)

    @tf.function
    def train(x0, x1, t):
        with tf.GradientTape() as tape:
            loss = rectified_flow.loss(velocity, x0, x1, t)
        optimizer.apply(tape.gradient(loss, weights))

    def data(n):
        return np.where(source.uniform((n, 1, 1)) < 0.5, -2.0, 2.0).astype(np.float32) * np.ones((1, 1, 2), np.float32)

    def distance(x):
        return float(np.abs(np.abs(x) - 2).mean())

    for _ in range(600):
        train(data(128), source.normal((128, 1, 2)), source.uniform((128,)))
    noise = source.normal((512, 1, 2))
    one, many = (rectified_flow.sample(velocity, noise, flow_steps(n)).numpy() for n in (1, 20))
    assert distance(many) < 0.5 < distance(one)
    for _ in range(600):
        rows = source.integers(0, 512, (128,))
        train(many[rows], noise[rows], source.uniform((128,)))
    assert distance(rectified_flow.sample(velocity, noise, ONE_STEP).numpy()) < distance(one) / 2


def test_the_diffusion_backbone_returns_what_its_noise_implies():
    """If the network knows the noise of a single point p, every number of steps ends in p."""
    p = tf.constant([1.0, -2.0])

    def noise_of(x, t):
        a = tf.exp(vp_flow.signal(t))[:, None, None]
        return (x - a * p) / tf.sqrt(1 - a * a)

    for steps in (1, 3):
        x = rectified_flow.sample(noise_of, NOISE.normal((4, 1, 2)), vp_flow.steps(rectified_flow.time_grid(steps)))
        np.testing.assert_allclose(x[:, 0], np.tile(p, (4, 1)), atol=1e-3)


# ---------- updates ----------


def test_learning_rate_falls_along_a_cosine():
    assert cosine_rate(2e-4, 0, 10) == 2e-4 and cosine_rate(2e-4, 5, 10) == pytest.approx(1e-4)
    assert cosine_rate(2e-4, 10, 10) == pytest.approx(0, abs=1e-19)


def test_the_average_follows_every_update_and_holds_the_frequencies():
    trained = level(3, 2)
    trainer = LevelTrainer(trained, 1e-2, 0.9)
    before = [v.numpy() for v in variables_of(trained.ema)]
    x0, x1, t = NOISE.normal((4, 3, 2)), NOISE.normal((4, 3, 2)), NOISE.uniform((4,))
    trainer.update(x0, x1, t, None, None, tf.constant(1e-2, tf.float64))
    for mean, old, new in zip(variables_of(trained.ema), before, variables_of(trained.network), strict=True):
        np.testing.assert_allclose(mean, ema_update(old, new.numpy(), 0.9), rtol=1e-6, atol=1e-7)
    frequencies = trained.network.diffusion.map_noise.freqs
    assert not any(v is frequencies for v in trainer.variables)


def test_the_fused_optimizer_is_the_plain_one():
    start, grads = NOISE.normal((4, 3), dtype=np.float64), [NOISE.normal((4, 3), dtype=np.float64) for _ in range(5)]
    found = []
    for fused in (False, True):
        variable = tf.Variable(start)
        optimizer = AdamW([variable], 1e-2, 0.1, fused=fused)
        for grad in grads:
            optimizer.apply([tf.constant(grad)])
        found.append([variable.numpy(), *(value for _, value in sorted(optimizer.state().items()))])
    for plain, fused in zip(*found, strict=True):
        np.testing.assert_allclose(plain, fused, rtol=1e-13, atol=1e-15)


def test_inverse_dynamics_learn_a_linear_system():
    """s' = s + 0.5 a: the action is the difference, doubled."""
    source = NoiseSource(1)
    inverse = InverseDynamics(2, 2, 64, dropout=0.0)
    trainer = InverseTrainer(inverse)
    update = tf.function(trainer.update, autograph=False)
    for _ in range(600):
        state, action = source.normal((128, 2)), source.uniform((128, 2), -0.8, 0.8)
        loss = update(*map(tf.constant, (state, action, state + 0.5 * action)), None)
    assert float(loss) < 5e-3


# ---------- acting ----------


class Scripted:
    """Two environments; the second ends at its second step, the first at its third."""

    n_envs = 2

    def reset(self, options=None):
        self.t = 0
        return {"state": np.zeros((2, 1, 3))}

    def step(self, actions):
        assert actions.shape == (2, 1, 2)
        self.t += 1
        done = np.array([self.t == 3, self.t == 2])
        return Step({"state": np.ones((2, 1, 3))}, np.array([1.0, 10.0]), done, np.zeros(2, bool), {})


def planner(candidates: int = 1, value=None, runtime: str = "plain", guidance: float = 2.0) -> DiffuserLite:
    levels = [level(n, 3, first=i == 0) for i, n in enumerate((5, 9))]
    acting = Acting(steps=2, guidance=(guidance, 0.0), candidates=candidates)
    return DiffuserLite(levels, InverseDynamics(3, 2, 16), np.ones(3), np.full(3, 2.0), acting, value, runtime)


def test_returns_count_the_step_that_ends_an_episode_and_nothing_after():
    found = run_lite_episodes(planner(), Scripted(), NoiseSource(0), lambda o, r: np.ones(2, np.float32), limit=9)
    np.testing.assert_array_equal(found.returns, [3, 20])
    np.testing.assert_array_equal(found.steps, [3, 2])
    lost = run_lite_episodes(
        planner(), Scripted(), NoiseSource(0), lambda o, r: np.ones(2, np.float32), limit=9, published="mujoco"
    )
    np.testing.assert_array_equal(lost.published, [2, 10])
    more = run_lite_episodes(
        planner(), Scripted(), NoiseSource(0), lambda o, r: np.ones(2, np.float32), limit=9, published="kitchen"
    )
    np.testing.assert_array_equal(more.published, [3, 30])


def test_the_compiled_program_is_the_levels_one_after_the_other():
    acting = planner()
    observations, targets = NOISE.normal((2, 3)), np.array([0.5, 1.0], np.float32)
    draws = acting.draw(NoiseSource(1), 2)
    state = (observations - 1) / 2
    known = [state, np.zeros_like(state)]
    for i, (each, noise) in enumerate(zip(acting.levels, draws, strict=True)):
        prior = np.zeros((2, *each.shape), np.float32)
        prior[:, 0], prior[:, -1] = known
        guidance = acting.acting.guidance[i]
        plans = each.sample(
            tf.constant(0.5 * noise), prior, acting.grid, tf.constant(targets[:, None]), guidance
        ).numpy()
        known = [plans[:, 0], plans[:, 1]]
    by_hand = acting.inverse(tf.constant(plans[:, 0]), tf.constant(plans[:, 1]))
    np.testing.assert_allclose(acting.act(observations, targets, draws), by_hand, atol=1e-4)


@pytest.mark.parametrize(("runtime", "candidates"), [("graph", 1), ("graph", 3), ("tflite", 3)])
def test_the_fast_programs_act_as_the_plain_one(runtime, candidates):
    """With returns that all want, with others, and with those again."""
    fast = planner(candidates, lambda states: tf.reduce_sum(states, axis=-1, keepdims=True), runtime)
    observations, draws = NOISE.normal((2, 3)), fast.draw(NoiseSource(1), 2)
    for targets in ([0.5, 0.5], [0.5, 1.0], [0.25, 0.25]):
        wanted = np.array(targets, np.float32)
        plain = fast.plan(*map(tf.constant, (observations, wanted)), [tf.constant(each) for each in draws])
        np.testing.assert_allclose(fast.act(observations, wanted, draws), plain, atol=2e-5)


def test_the_fast_program_in_double_precision():
    with precision("float64"):
        fast = planner(runtime="graph")
        observations, wanted = NOISE.normal((2, 3), dtype=np.float64), np.array([0.5, 1.0])
        draws = [each.astype(np.float64) for each in fast.draw(NoiseSource(1), 2)]
        plain = fast.plan(*map(tf.constant, (observations, wanted)), [tf.constant(each) for each in draws])
        np.testing.assert_allclose(fast.act(observations, wanted, draws), plain, atol=1e-12)


def test_the_best_of_the_candidates_is_acted_upon():
    with pytest.raises(UserError, match="iql_training"):
        planner(candidates=4)
    acting = planner(candidates=4, value=lambda states: states[..., :1])
    plans = tf.constant(NOISE.normal((8, 5, 3)))
    best = acting._best(plans, 4).numpy()
    grouped = plans.numpy().reshape(2, 4, 5, 3)
    np.testing.assert_array_equal(best, grouped[np.arange(2), grouped[:, :, -1, 0].argmax(axis=1)])


def test_targets():
    np.testing.assert_allclose(kitchen_targets("kitchen-mixed-v0", np.array([0, 1, 3, 4])), [0.3, 0.35, 0.5, 1])
    places = np.array([[0.0, 0.0], [20.0, 10.0], [20.0, 30.0]])
    np.testing.assert_allclose(antmaze_targets("antmaze-large-diverse-v2", places), [0.25, 0.3, 0.6])
    np.testing.assert_allclose(antmaze_targets("antmaze-large-diverse-v2", places, upstream_typo=True), [1, 1, 1])
    np.testing.assert_allclose(antmaze_targets("antmaze-medium-play-v2", places), [0.2, 0.2, 0.8])
    assert return_scale("halfcheetah-medium-expert-v2") == 3600 and return_scale("halfcheetah-medium-v2") == 1700
