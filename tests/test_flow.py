"""Flow policies and ReinFlow: whole small runs, resumed to the bit, and the mathematics beside recordings."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tests.small_runs import DIMS, SMALL, assert_same_checkpoint, make_data, rows, run

import diffusion_rl
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.core.optimizers import AdamW
from diffusion_rl.methods.on_policy.fpo import FPO
from diffusion_rl.methods.on_policy.reinflow import ReinFlow, ShortcutReinFlow
from diffusion_rl.networks.critics import CriticObs
from diffusion_rl.networks.flow import FlowMLP, ShortcutFlowMLP
from diffusion_rl.networks.layers import Network, variables_of
from diffusion_rl.policies.flow import FlowPolicy, ShortcutFlowPolicy, draw_times
from diffusion_rl.training.checkpoint import load_checkpoint
from diffusion_rl.training.rollout import Rollout

H, A, O = 3, 2, 4  # noqa: E741
KINDS = ("reflow", "shortcut")
PRE = {kind: f"gym/pretrain/hopper-medium-v2/pre_{kind}_mlp" for kind in KINDS}
TUNE = {kind: f"gym/finetune/hopper-v2/ft_ppo_{kind}_mlp" for kind in KINDS}
EVALUATE = {kind: f"gym/eval/hopper-v2/eval_{kind}_mlp" for kind in KINDS}
every_kind = pytest.mark.parametrize("kind", ["reflow", pytest.param("shortcut", marks=pytest.mark.slow)])
FPO_RUN = "gym/finetune/hopper-v2/ft_fpo_reflow_mlp"
SHORT = ("env.n_envs=3", "env.max_episode_steps=40", "++env.threads=1")
for _kind in KINDS:
    SMALL[PRE[_kind]] = [
        *(f"model.network.{DIMS}", "train.batch_size=32", "train.n_epochs=3", "train.save_model_freq=1"),
        *("+train.epoch_start_ema=2", "+train.update_ema_freq=2", "+tensorboard=false"),
    ]
    SMALL[TUNE[_kind]] = [
        *(*SHORT, f"model.policy.{DIMS}", f"model.critic.{DIMS}", "train.n_steps=6", "train.batch_size=50"),
        *("train.update_epochs=2", "train.val_freq=3", "train.save_model_freq=1", "train.n_train_itr=4"),
        *("model.noise_hidden_dims=[8]", "+tensorboard=false"),
    ]
    SMALL[EVALUATE[_kind]] = [*SHORT, f"model.network.{DIMS}", "n_steps=20"]


SMALL[FPO_RUN] = [
    *(*SHORT, f"model.actor.{DIMS}", f"model.critic.{DIMS}", "train.n_steps=6", "train.batch_size=9"),
    *("train.update_epochs=2", "train.val_freq=3", "train.save_model_freq=1", "train.n_train_itr=4"),
    *("model.n_pairs=3", "+tensorboard=false"),
]


def state(folder, number):
    return folder / "checkpoint" / f"state_{number}.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """kind -> the folder of a pre-training of three epochs."""
    done = {}

    def once(kind):
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp(kind)
            run(PRE[kind], done[kind])
        return done[kind]

    return once


@pytest.mark.slow
@every_kind
def test_pre_training_learns_resumes_and_is_evaluated(base, kind, tmp_path, capsys):
    losses = [row["loss"] for row in rows(base(kind))]
    assert losses[-1] < losses[0]
    halves = tmp_path / "halves"
    shutil.copytree(base(kind), halves)
    for n in (2, 3):
        state(halves, n).unlink()
    run(PRE[kind], halves, "resume=auto")
    assert_same_checkpoint(state(base(kind), 3), state(halves, 3))
    run(EVALUATE[kind], tmp_path / "evaluated", f"base_policy_path={base(kind)}")
    assert "eval: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_dealt_to_the_cores_has_the_loss_of_the_whole(tmp_path, kind):
    """Of a shortcut model the first quarter of the batch learns from smaller steps, wherever it is computed."""
    losses = []
    for name, changes in (("fast", ()), ("plain", ("+train.fast=false",))):
        data = f"train_dataset_path={make_data(tmp_path / 'train.npz')}"
        run(PRE[kind], tmp_path / name, data, "train.batch_size=128", "train.n_epochs=1", *changes)
        losses.append(rows(tmp_path / name)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@every_kind
def test_fine_tuning_resumed_equals_at_once_and_is_evaluated(base, kind, tmp_path):
    policy, whole, halves = f"base_policy_path={base(kind)}", tmp_path / "whole", tmp_path / "halves"
    loop = run(TUNE[kind], whole, policy)
    assert [row["kind"] for row in rows(whole)] == ["eval", "train", "train", "eval"]
    shutil.copytree(whole, halves)
    for n in (2, 3):
        state(halves, n).unlink()
    run(TUNE[kind], halves, policy, "resume=auto")
    assert rows(halves) == rows(whole)
    assert_same_checkpoint(state(whole, 3), state(halves, 3))
    before, after = (load_checkpoint(state(whole, n)).select("model.") for n in (0, 3))
    assert any(name.startswith("actor_old.") for name in before)
    for name, value in before.items():  # nothing moves what is frozen; the noise narrows by its schedule
        changed = np.any(value != after[name])
        assert changed == (not name.startswith("actor_old.") and not name.endswith("logvar_min")), name
    assert rows(whole)[-1]["max_noise_std"] < rows(whole)[0]["max_noise_std"] <= 0.24
    evaluated = run(EVALUATE[kind], tmp_path / "evaluated", f"base_policy_path={whole}")
    for ours, theirs in zip(variables_of(evaluated.policy.network), variables_of(loop.model.network), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_fpo_resumed_equals_at_once_and_is_evaluated(base, tmp_path, capsys):
    policy, whole, halves = f"base_policy_path={base('reflow')}", tmp_path / "whole", tmp_path / "halves"
    run(FPO_RUN, whole, policy)
    first = rows(whole)[1]
    assert abs(first["ratio"] - 1) < 0.1 and first["flow_loss"] > 0
    shutil.copytree(whole, halves)
    for n in (2, 3):
        state(halves, n).unlink()
    run(FPO_RUN, halves, policy, "resume=auto")
    assert rows(halves) == rows(whole)
    assert_same_checkpoint(state(whole, 3), state(halves, 3))
    run(EVALUATE["reflow"], tmp_path / "evaluated", f"base_policy_path={whole}")
    assert "eval: " in capsys.readouterr().out


@pytest.mark.parametrize("ratio_per_pair", [False, True])
def test_the_ratio_of_fpo(ratio_per_pair):
    """It is 1 before any update; its gradient is minus that of the flow-matching loss; beyond the clip it has none."""
    with precision("float64"), initial_weights(NoiseSource(0)):
        network = FlowMLP(horizon_steps=H, action_dim=A, cond_dim=O, mlp_dims=[8, 8, 8], time_dim=4)
        sizes = {"horizon_steps": H, "obs_dim": O, "action_dim": A, "norm_adv": False, "n_pairs": 5}
        policy = FPO(network, CriticObs(O, [8, 8, 8]), ratio_per_pair=ratio_per_pair, **sizes)
        rng = NoiseSource(1)
        obs = {"state": tf.constant(rng.normal((7, 1, O), np.float64))}
        actions, ones = tf.constant(rng.normal((7, H, A), np.float64)), tf.ones([7], tf.float64)
        times, noise = (tf.constant(part) for part in policy.draw_pairs(rng, 7))
        old = policy.pair_losses(obs, actions, times, noise)
        variables = variables_of(network)
        with tf.GradientTape(persistent=True) as tape:
            losses = policy.loss(obs, actions, ones, ones, ones, old, times, noise)
            matching = tf.reduce_mean(policy.pair_losses(obs, actions, times, noise))
        assert losses["ratio"].numpy() == 1 and losses["approx_kl"].numpy() == 0
        pairs = zip(tape.gradient(losses["pg_loss"], variables), tape.gradient(matching, variables), strict=True)
        for ours, theirs in pairs:  # the policy's loss is minus the ratio
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
        with tf.GradientTape() as tape:
            far = policy.loss(obs, actions, ones, ones, ones, old + 1, times, noise)
        assert far["clipfrac"].numpy() == 1 and far["ratio"].numpy() == pytest.approx(np.e)
        assert not any(np.any(g) for g in tape.gradient(far["pg_loss"], variables, unconnected_gradients="zero"))


class PlainVelocity(Network):
    """The network of FPO's authors in their gridworld: three layers from [observation, x, time]."""

    def __init__(self, weights):
        super().__init__(dtype="float64")
        self.horizon_steps, self.action_dim = 1, weights["w.layer3.bias"].shape[0]
        self.weights_by_name = {name[2:]: tf.Variable(value) for name, value in weights.items() if name[:2] == "w."}

    def call(self, x, time, cond):
        h = tf.concat([cond["state"][:, 0], x[:, 0], time[:, None]], axis=1)
        for i in (1, 2, 3):
            w = self.weights_by_name
            h = tf.matmul(h, w[f"layer{i}.weight"], transpose_b=True) + w[f"layer{i}.bias"]
            h = tf.nn.relu(h) if i < 3 else h
        return h[:, None]


@pytest.mark.parametrize("clip", [0.05, 0.2])
def test_fpo_beside_its_authors_code(clip):
    """Losses of pairs, ratios, clipped loss, gradients and a sample, recorded with the classes of their gridworld."""
    recorded = dict(np.load(Path(__file__).parent / "data" / "fpo_gridworld.npz"))
    with precision("float64"), initial_weights(NoiseSource(0)):
        network, n_pairs = PlainVelocity(recorded), recorded["times"].shape[1]
        sizes = {"horizon_steps": 1, "obs_dim": 3, "action_dim": 2, "inference_steps": 10, "time_grid": "left"}
        policy = FPO(network, CriticObs(3, [8, 8, 8]), n_pairs=n_pairs, clip_ploss_coef=clip, **sizes)
        obs, actions = {"state": recorded["obs"][:, None]}, tf.constant(recorded["actions"][:, None])
        times, noise = tf.constant(recorded["times"]), tf.constant(recorded["noise"][:, :, None])
        np.testing.assert_allclose(policy.pair_losses(obs, actions, times, noise), recorded["new"], rtol=1e-12)
        ones, old, advantages = tf.ones([6], tf.float64), tf.constant(recorded["old"]), recorded["advantages"]
        with tf.GradientTape() as tape:
            losses = policy.loss(obs, actions, ones, ones, tf.constant(advantages), old, times, noise)
        np.testing.assert_allclose(losses["ratio"], np.mean(recorded[f"rho_{clip}"]), rtol=1e-12)
        np.testing.assert_allclose(losses["pg_loss"], recorded[f"loss_{clip}"], rtol=0, atol=1e-7)  # 1e-8 in advantages
        for name, grad in tape.gradient(losses["pg_loss"], network.weights_by_name).items():
            np.testing.assert_allclose(grad, recorded[f"grad_{clip}.{name}"], rtol=0, atol=1e-7)
        policy.act_min, policy.act_max = -9.0, 9.0
        drawn = policy.sample({"state": recorded["obs"][:1, None]}, tf.constant(recorded["start"][:, None]))
        np.testing.assert_allclose(drawn.trajectories[0, 0], recorded["sampled"], rtol=0, atol=1e-12)


def test_the_trust_region_of_fpo_plus_draws_back():
    """By hand: PPO's clip where the advantage is positive, r A - |A| / (2 clip) (r - 1)^2 where it is negative."""
    with precision("float64"), initial_weights(NoiseSource(0)):
        network = FlowMLP(horizon_steps=H, action_dim=A, cond_dim=O, mlp_dims=[8, 8, 8], time_dim=4)
        sizes = {"horizon_steps": H, "obs_dim": O, "action_dim": A, "clip_ploss_coef": 0.1}
        policy = FPO(network, CriticObs(O, [8, 8, 8]), trust_region="asymmetric", zero_noise=True, **sizes)
        log_ratio = tf.math.log(tf.constant([1.3, 1.3, 0.5, 0.5], tf.float64))
        advantages = tf.constant([2.0, -2.0, 2.0, -2.0], tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(log_ratio)
            loss = policy.ratio_loss(log_ratio, advantages)[0]
        expected = [-2 * 1.1, 2 * 1.3 + 2 / 0.2 * 0.09, -2 * 0.5, 2 * 0.5 + 2 / 0.2 * 0.25]
        np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-12)
        slope = tape.gradient(loss, log_ratio).numpy()
        assert slope[0] == 0 and slope[1] > 0 > slope[3]  # towards 1 from both sides
        cond = {"state": tf.ones([3, 1, O], tf.float64)}
        noise = tf.constant(NoiseSource(1).normal((2, 3, H, A), np.float64))
        zero, other = (policy.decide(cond, part, True)[0] for part in noise)
        np.testing.assert_array_equal(zero, other)
        assert np.any(policy.decide(cond, noise[0], False)[0] != policy.decide(cond, noise[1], False)[0])
    with pytest.raises(UserError, match="model.trust_region=round: take clip or asymmetric"):
        FPO(network, CriticObs(O, [8, 8, 8]), trust_region="round", **sizes)


@every_kind
def test_what_was_trained_acts_in_python_and_is_exported(base, kind, tmp_path):
    """A fine-tuned flow acts without noise, as its evaluation does."""
    tuned = tmp_path / "tuned"
    run(TUNE[kind], tuned, f"base_policy_path={base(kind)}", "train.n_train_itr=2")
    observation = np.zeros((2, 1, 11), np.float32)
    for folder in (base(kind), tuned):
        policy = diffusion_rl.load_policy(folder)
        assert policy.act(observation, rng=0).shape == (2, 4, 3)
        np.testing.assert_allclose(policy.sample(observation, rng=0), policy.plan(observation, rng=0), atol=1e-5)
        with pytest.raises(UserError, match="have no density here"):
            policy.log_prob(observation, policy.plan(observation, rng=0))
        assert policy.export("savedmodel", tmp_path / f"{folder.name}_exported").deviation <= 1e-5


def make(kind="reflow", **changes):
    small = {"horizon_steps": H, "action_dim": A, "cond_dim": O, "mlp_dims": [8, 8, 8], "residual_style": True}
    with initial_weights(NoiseSource(0)):
        if "fpo" in kind:
            options = {"ratio_per_pair": True, "trust_region": "asymmetric"} if kind == "fpo++" else {}
            options |= {"horizon_steps": H, "obs_dim": O, "action_dim": A, "n_pairs": 3}
            return FPO(FlowMLP(**small, time_dim=4), CriticObs(O, [8, 8, 8]), **options | changes)
        if kind == "reflow":
            network, cls = FlowMLP(**small, time_dim=4), ReinFlow
        else:
            network, cls = ShortcutFlowMLP(**small, td_emb_dim=4, cond_mlp_dims=[6, 4]), ShortcutReinFlow
        options = {"noise_scheduler_type": "learn", "inference_steps": 4, "ft_denoising_steps": 4}
        options |= {"min_logprob_denoising_std": 0.1, "max_logprob_denoising_std": 0.2}
        options |= {"min_sampling_denoising_std": 0.1, "act_dim": A, "horizon_steps": H, "obs_dim": O}
        return cls(policy=network, critic=CriticObs(O, [8, 8, 8]), **options | changes)


@pytest.mark.parametrize(
    ("kind", "imitating"),
    [
        ("reflow", True),
        ("fpo", False),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("shortcut", True), ("reflow", False))),
        pytest.param("fpo++", False, marks=pytest.mark.slow),
    ],
)
def test_the_update_in_chunks_is_the_plain_one(kind, imitating, monkeypatch):
    """25 samples in two chunks of 13, one of whose rows is nothing; residual MLPs are folded."""
    monkeypatch.setattr("diffusion_rl.methods.on_policy.reinflow.CHUNK", 13)
    monkeypatch.setattr("diffusion_rl.methods.on_policy.fpo.PAIRS", 13 * 3)
    rate = {"first_cycle_steps": 10, "warmup_steps": 0, "min_lr": 1e-3}
    settings = {"update_epochs": 2, "batch_size": 30, "repeat_samples": True, "ent_coef": 0.03, "vf_coef": 0.5}
    settings |= {"actor_lr": 1e-3, "actor_lr_scheduler": rate, "actor_weight_decay": 0, "gamma": 0.99}
    settings |= {"critic_lr": 1e-3, "critic_lr_scheduler": rate, "critic_weight_decay": 0, "max_grad_norm": 0.5}
    settings |= {"use_bc_loss": imitating, "bc_loss_coeff": 0.1}
    results = []
    with precision("float64"):
        for fast in (True, False):
            changes = {} if "fpo" in kind else {"noise_scheduler_type": "learn_decay"}
            policy, rng = make(kind, **changes), NoiseSource(1)
            trainer = policy.make_trainer(settings | {"fast": fast}, H)
            observations = rng.normal((5, 5, 1, O), np.float64)
            drawn = [trainer.actor.act(o, trainer.actor.draw(rng, 5), deterministic=False) for o in observations]
            rollout = Rollout(
                observations={"state": observations},
                last_observations={"state": rng.normal((5, 1, O), np.float64)},
                decisions={k: np.stack([d.arrays()[k] for d in drawn]) for k in drawn[0].arrays()},
                rewards=rng.normal((5, 5), np.float64),
                terminated=np.zeros((5, 5), bool),
                firsts=np.zeros((6, 5)),
            )
            losses = trainer.update(rollout, rng, train_actor=True)["losses"]
            assert len(losses["pg_loss"]) == (2 if "fpo" in kind else 18)
            assert losses["ratio"][0] == pytest.approx(1, abs=1e-12)
            results.append([v.numpy() for v in variables_of(policy)] + [np.array(losses[k]) for k in sorted(losses)])
    for fast, plain in zip(*results, strict=True):
        np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_chains_have_the_density_and_the_entropy_of_their_gaussians(kind):
    """Beside a plain sum of log-densities, and beside the mean of minus the log-probability."""
    with precision("float64"):
        policy, rng = (
            make(kind, randn_clip_value=100, denoised_clip_value=100, act_min=-100, act_max=100),
            NoiseSource(3),
        )
        cond = {"state": tf.constant(np.repeat(rng.normal((1, 1, O), np.float64), 4000, axis=0))}
        drawn = policy.sample(cond, tf.constant(rng.normal(policy.noise_shape(4000), np.float64)))
        log_probs, entropy, _ = policy.log_probs(cond, drawn.chains)
    np.testing.assert_allclose(log_probs, drawn.log_probs, rtol=0, atol=1e-12)
    assert abs(np.mean(entropy) + np.mean(log_probs)) < 0.01
    mean, std, total = np.zeros(()), np.ones(()), np.zeros(4000)
    for i, x in enumerate(drawn.chains.numpy().swapaxes(0, 1)):
        total += np.sum(-0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi), axis=(1, 2))
        if i < policy.inference_steps:
            with precision("float64"):
                mean, std = policy.step(i, policy._grid(sampling=True)[i], tf.constant(x), cond)
    np.testing.assert_allclose(log_probs, total / (5 * H * A), rtol=0, atol=1e-12)


def test_a_flow_and_its_shortcut_learn_two_modes():
    """Data at -1 and 1: twenty steps find both; one step of a shortcut model goes where its many steps go."""
    for kind in KINDS:
        small = {"horizon_steps": 1, "action_dim": 1, "cond_dim": 1, "mlp_dims": [64, 64, 64], "residual_style": True}
        rng = NoiseSource(0)
        with initial_weights(rng):
            if kind == "reflow":
                policy = FlowPolicy(FlowMLP(**small, time_dim=16), 1, 1, 1, -2, 2)
            else:
                network = ShortcutFlowMLP(**small, td_emb_dim=16, cond_mlp_dims=[16])
                policy = ShortcutFlowPolicy(network, horizon_steps=1, obs_dim=1, action_dim=1, act_min=-2, act_max=2)
        variables = variables_of(policy.network)
        optimizer, cond = AdamW(variables, 3e-3, 0.0), {"state": tf.zeros([256, 1, 1])}

        @tf.function(jit_compile=True)
        def step(x1, time, noise, policy=policy, optimizer=optimizer, variables=variables, cond=cond):
            with tf.GradientTape() as tape:
                loss = policy.loss(x1, cond, time, noise)
            optimizer.apply(tape.gradient(loss, variables))
            return loss

        losses = []
        for _ in range({"reflow": 600, "shortcut": 900}[kind]):
            x1 = np.sign(rng.normal((256, 1, 1), np.float32))
            losses.append(step(x1, *policy.draw_training(rng, (256,))).numpy())
        assert np.mean(losses[-20:]) < 0.7 * losses[0]  # much of it is the noise's own variance
        noise = tf.constant(rng.normal((256, 1, 1), np.float32))
        many = policy.sample(cond, noise, 20).trajectories.numpy().ravel()
        assert np.mean(np.abs(np.abs(many) - 1) < 0.4) > 0.8 and 0.3 < np.mean(many > 0) < 0.7
        if kind == "shortcut":
            once = policy.sample(cond, noise, 1).trajectories.numpy().ravel()
            assert np.mean(np.abs(once - many)) < 0.4


def test_times_of_training_have_their_distributions():
    for kind, mean in (("uniform", 0.5), ("logitnormal", 0.5), ("beta", 0.999 * 0.4)):
        times = draw_times(NoiseSource(0), kind, (20000,))
        assert times.min() >= 0 and times.max() < 1 and abs(times.mean() - mean) < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_grid": "open"}, "model.time_grid=open: take one of closed, left, upstream"),
        ({"noise_scheduler_type": "cosine"}, "noise_scheduler_type=cosine: take one of learn, learn_decay"),
        ({"min_logprob_denoising_std": 0.3}, "more than 0, at most the maximum 0.2"),
        ({"ft_denoising_steps": 5}, "model.ft_denoising_steps=5: 0 to inference_steps=4"),
        ({"bc_loss_type": "KL"}, "model.bc_loss_type=KL: W2 is the only one"),
        ({"learn_explore_time_embedding": True}, "needs noise_hidden_dims"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)
