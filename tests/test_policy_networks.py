"""U-Net, transformer, Gaussian and mixture policies: sizes, refusals, compiled training, choice of modes."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.core.ema import AVERAGE
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.interop.description import infer_kind
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.methods.pretraining.losses import BATCHES_PER_CALL, PreTrainer
from diffusion_rl.networks.gaussian import GaussianMLP
from diffusion_rl.networks.gmm import GMMMLP
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.transformer import GaussianTransformer, GMMTransformer
from diffusion_rl.networks.unet1d import Unet1D
from diffusion_rl.policies.diffusion import DiffusionPolicy
from diffusion_rl.policies.gaussian import GaussianPolicy
from diffusion_rl.policies.gmm import GMMPolicy
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.policy_files import load_policy

A, H, OBS, TO = 2, 4, 3, 2
SMALL_TRANSFORMER = {"transformer_embed_dim": 8, "transformer_num_heads": 2, "transformer_num_layers": 2}


def observations(batch, seed=0):
    return {"state": tf.constant(NoiseSource(seed).normal((batch, TO, OBS)))}


def unet(**kwargs):
    options = {"diffusion_step_embed_dim": 4, "dim": 4, "dim_mults": [1, 2], "kernel_size": 3} | kwargs
    return Unet1D(A, OBS * TO, **options)


def diffusion(network):
    return DiffusionPolicy(network, horizon_steps=H, obs_dim=OBS, action_dim=A, denoising_steps=5)


NETWORKS = {
    "unet": lambda: unet(n_groups=2, cond_predict_scale=True),
    "unet, observation MLP": lambda: unet(cond_mlp_dims=[5, 3], activation_type="ReLU"),
    "unet, small encoders": lambda: unet(smaller_encoder=True, dim_mults=[1, 2, 4], n_groups=4, groupnorm_eps=1e-4),
    "Gaussian MLP": lambda: GaussianMLP(A, H, OBS * TO, [8], fixed_std=0.1, learn_fixed_std=True),
    "Gaussian MLP, predicted": lambda: GaussianMLP(A, H, OBS * TO, [8]),
    "mixture MLP": lambda: GMMMLP(A, H, OBS * TO, [8], num_modes=3, fixed_std=0.1),
    "mixture MLP, learned": lambda: GMMMLP(A, H, OBS * TO, [8], num_modes=3, fixed_std=0.1, learn_fixed_std=True),
    "mixture MLP, predicted": lambda: GMMMLP(A, H, OBS * TO, [8], num_modes=3),
    "transformer": lambda: GaussianTransformer(A, H, OBS * TO, fixed_std=0.1, **SMALL_TRANSFORMER),
    "transformer, predicted": lambda: GaussianTransformer(A, H, OBS * TO, **SMALL_TRANSFORMER),
    "mixture transformer": lambda: GMMTransformer(A, H, OBS * TO, 3, fixed_std=0.1, **SMALL_TRANSFORMER),
    "mixture transformer, predicted": lambda: GMMTransformer(A, H, OBS * TO, 3, **SMALL_TRANSFORMER),
}
POLICIES = {Unet1D: diffusion, GMMMLP: lambda n: GMMPolicy(n, H), GMMTransformer: lambda n: GMMPolicy(n, H)}


def policy_of(name):
    network = NETWORKS[name]()
    return POLICIES.get(type(network), lambda n: GaussianPolicy(n, H))(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_survive_writing_and_reading(name):
    one, other = NETWORKS[name](), NETWORKS[name]()
    for variable in variables_of(one):
        variable.assign(variable + tf.reshape(tf.range(tf.size(variable), dtype=tf.float32), variable.shape) * 1e-3)
    weights = state_dict(one)
    load_state_dict(other, weights)
    back = state_dict(other)
    assert len(weights) == len(variables_of(one)) and list(back) == list(weights)
    assert all(np.array_equal(back[k], weights[k]) for k in weights)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("mixture MLP, learned", BATCHES_PER_CALL), ("transformer, predicted", BATCHES_PER_CALL)]
    + [(name, 3) for name in ("Gaussian MLP, predicted", "mixture transformer, predicted")],
)
def test_training_lowers_the_loss(name, steps):
    """From the loss of the policy on that batch; groups of the full number of steps are compiled by XLA."""
    noise = NoiseSource(1)
    states, actions = noise.normal((30, OBS)), np.tanh(noise.normal((30, A)))
    windows = np.stack([np.arange(20), np.arange(20)], axis=1)
    schedule = {"first_cycle_steps": 10, "warmup_steps": 0, "min_lr": 1e-2}
    train = {"learning_rate": 1e-2, "weight_decay": 1e-6, "batch_size": 6, "lr_scheduler": schedule, "ent_coef": 0.01}
    policy = policy_of(name)
    data = SimpleNamespace(states=states, actions=actions, indices=windows, cond_steps=TO, images=None)
    trainer = PreTrainer(policy, data, train, 0.9)
    items = np.tile(np.arange(6), (steps, 1))
    t = np.tile(noise.integers(0, 5, (6,)), (steps, 1))
    draws = np.tile(noise.normal((6, H, A)), (steps, 1, 1, 1))
    first = trainer.evaluate(items[0], t[0], draws[0])
    losses = trainer.steps(items, t, draws, np.full(steps, AVERAGE))
    np.testing.assert_allclose(losses[0], first, rtol=1e-5)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize("name", [n for n in NETWORKS if "transformer" in n])
def test_transformer_weights_without_influence_have_a_gradient_of_zero(name):
    """Weight decay then acts on them as on all others; the modes' range alone is not trained."""
    network = NETWORKS[name]()
    with tf.GradientTape() as tape:
        total = tf.add_n([tf.reduce_sum(tf.sin(x)) for x in network(observations(3))])
    trained = [v for v in variables_of(network) if v.trainable]
    assert all(g is not None for g in tape.gradient(total, trained))


def test_attention_to_a_single_memory_needs_no_queries():
    """torch's decoder layer and ours, on a memory of one entry."""
    torch = pytest.importorskip("torch")
    with precision("float64"):
        network = GaussianTransformer(A, H, OBS * TO, **SMALL_TRANSFORMER, fixed_std=0.1)
        layer = network.transformer.decoder.layers[0]
    theirs = torch.nn.TransformerDecoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True).double()
    theirs.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state_dict(layer).items()})
    x, memory = NoiseSource(3).normal((5, H, 8), np.float64), NoiseSource(4).normal((5, 8), np.float64)
    expected = theirs(torch.from_numpy(x), torch.from_numpy(memory)[:, None]).detach().numpy()
    np.testing.assert_allclose(layer(tf.constant(x), tf.constant(memory)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("horizon", [4, 8, 16, 20])
def test_unet_keeps_the_length_of_long_and_short_chunks(horizon):
    x = tf.constant(NoiseSource(0).normal((3, horizon, A)))
    assert unet(dim_mults=[1, 2, 2], n_groups=2)(x, tf.constant([0, 1, 2]), observations(3)).shape == x.shape


def test_unet_and_odd_chunks():
    """With two levels an odd chunk comes back one step longer, as in the reference; with three it is refused."""
    x, t = tf.zeros([2, 5, A]), tf.constant([0, 1])
    assert unet()(x, t, observations(2)).shape == (2, 6, A)
    with pytest.raises(UserError, match="multiple of 4"):
        unet(dim_mults=[1, 2, 2])(x, t, observations(2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: unet(kernel_size=4), "odd"),
        (lambda: unet(n_groups=3), "does not divide"),
        (lambda: unet(activation_type="Swish"), "unknown activation"),
        (lambda: GaussianTransformer(A, H, OBS, transformer_embed_dim=9), "multiple of transformer_num_heads"),
        (lambda: GaussianTransformer(A, H, OBS, transformer_activation="tanh"), "gelu, relu"),
        (lambda: GaussianTransformer(A, H, OBS, p_drop_attn=-0.1), "take rates from 0 to below 1"),
        (lambda: GaussianTransformer(A, H, OBS, p_drop_emb=1.0), "take rates from 0 to below 1"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_a_uniform_draw_picks_the_mode_by_its_weight():
    policy = policy_of("mixture MLP")
    cond, noise = observations(1), tf.zeros([1, 3, H * A])
    means, _, logits = policy.network(cond)
    edges = np.cumsum(np.exp(logits[0]) / np.exp(logits[0]).sum())
    for mode, uniform in enumerate([edges[0] / 2, (edges[0] + edges[1]) / 2, (edges[1] + 1) / 2]):
        action = policy.sample(cond, noise, tf.constant([uniform], tf.float32))
        np.testing.assert_allclose(tf.reshape(action, [-1]), means[0, mode], rtol=1e-6)


def test_noise_is_clipped_and_deterministic_samples_are_close_to_the_mean():
    policy = GaussianPolicy(GaussianMLP(A, H, OBS * TO, [8], fixed_std=0.5), H, randn_clip_value=2)
    cond = observations(3)
    mean, std = policy.mean_std(cond)
    action, _ = policy.sample(cond, tf.fill([3, H * A], 7.0))
    np.testing.assert_allclose(tf.reshape(action, [3, -1]), mean + 2 * std, rtol=1e-6)
    action, _ = policy.sample(cond, tf.fill([3, H * A], 1.0), deterministic=True)
    np.testing.assert_allclose(tf.reshape(action, [3, -1]), mean, atol=1.1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("unet", "diffusion_policy"),
        ("Gaussian MLP", "gaussian_policy"),
        ("transformer", "gaussian_policy"),
        ("mixture MLP", "gmm_policy"),
        ("mixture transformer", "gmm_policy"),
    ],
)
def test_a_checkpoint_of_the_reference_says_what_it_holds(name, kind):
    policy = policy_of(name)
    assert kind == policy.KIND == infer_kind({f"model.{k}": v for k, v in state_dict(policy).items()})


@pytest.mark.parametrize("build", [GaussianMLP, GaussianTransformer, GMMMLP, GMMTransformer])
def test_a_spread_that_was_fixed_may_be_learned_from_then_on(build):
    """As in the reference's configurations: pre-training has no variable for it, fine-tuning has."""
    modes = {"num_modes": 3} if build in (GMMMLP, GMMTransformer) else {}
    sizes = {"mlp_dims": [8]} if build in (GaussianMLP, GMMMLP) else SMALL_TRANSFORMER
    make = functools.partial(build, A, H, OBS * TO, fixed_std=0.1, **modes, **sizes)
    kind = GMMPolicy if modes else GaussianPolicy
    fixed, learned = kind(make(), H), kind(make(learn_fixed_std=True), H)
    weights = {f"model.{name}": value for name, value in state_dict(fixed).items()}
    load_policy(learned, Checkpoint(weights, {"kind": kind.KIND}), "state_1.safetensors")
    found = state_dict(learned.network)
    np.testing.assert_allclose(found.pop("logvar"), np.log(0.01), rtol=1e-6)
    np.testing.assert_equal(found, state_dict(fixed.network))
