"""Compiled functions: traced no more once training is under way, and the fast forms equal to the plain ones."""

import contextlib
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from tests.small_runs import FINE_TUNE, PRE_TRAIN, loop, make_base_policy, make_data

from diffusion_rl.core.ema import AVERAGE, COPY, KEEP
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.methods.on_policy import dppo_fast
from diffusion_rl.methods.on_policy.chunked import chunks
from diffusion_rl.methods.on_policy.dppo import DPPO, DPPOTrainer
from diffusion_rl.methods.pretraining.losses import PreTrainer
from diffusion_rl.networks.critics import CriticObs
from diffusion_rl.networks.eta import EtaFixed
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.mlp import DiffusionMLP
from diffusion_rl.policies.diffusion import DiffusionPolicy

SAME = 1e-10
H, O, A, K = 4, 5, 3, 4  # noqa: E741
SCHEDULE = {"first_cycle_steps": 1000, "warmup_steps": 10, "min_lr": 1e-3}


# --- no tracing once training is under way


def compiled_functions(owner, seen=None):
    """{path: tf.function} of everything compiled that `owner` holds, in closures too."""
    found, stack, seen = {}, [("", owner)], set()
    while stack:
        path, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if hasattr(value, "experimental_get_tracing_count"):
            found[path] = value
            value = value.python_function
        if isinstance(value, dict):
            stack += [(f"{path}[{key}]", item) for key, item in value.items()]
        elif getattr(value, "__closure__", None):
            stack += [(f"{path}<closure {i}>", cell.cell_contents) for i, cell in enumerate(value.__closure__)]
        elif type(value).__module__.startswith("diffusion_rl.") and not isinstance(value, tf.Module):
            stack += [(f"{path}.{key}", item) for key, item in vars(value).items()]
    return found


def tracing_counts(trainer):
    return {name: f.experimental_get_tracing_count() for name, f in compiled_functions(trainer).items()}


@pytest.mark.parametrize("fast", [True, False])
def test_fine_tuning_traces_nothing_after_its_second_iteration(tmp_path, fast):
    base = make_base_policy(tmp_path / "base.safetensors")
    overrides = [f"base_policy_path={base}", "train.n_train_itr=5", "train.val_freq=2", f"+train.fast={fast}"]
    training = loop(FINE_TUNE, tmp_path / "run", *overrides, "train.batch_size=10")  # of 36 rows: some are left over
    counts = []
    training.observer = lambda seen: counts.append(tracing_counts(training.trainer))
    training.run()
    # Iterations 0, 2 and 4 evaluate: after the second iteration there was one evaluation and one update.
    assert counts[1] == counts[2] == counts[3] == counts[4]
    ran = {name: count for name, count in counts[-1].items() if count}
    assert all(count == 1 or (count == 2 and "_values" in name) for name, count in ran.items()), ran
    assert any("_samplers" in name for name in ran) and any("_step" in name for name in ran)


def test_pre_training_traces_nothing_after_its_second_epoch(tmp_path):
    data = make_data(tmp_path / "train.npz")  # 185 windows: 166 of them in 5 full batches and a rest
    overrides = [f"train_dataset_path={data}", "train.n_epochs=5", "train.batch_size=16", "train.train_split=1"]
    training = loop(PRE_TRAIN, tmp_path / "run", *overrides)
    counts = []
    training.observer = lambda seen: counts.append(tracing_counts(training.trainer))
    training.run()
    assert counts[1] == counts[2] == counts[3] == counts[4]
    # full groups, then ever more general shapes
    assert {name: count for name, count in counts[-1].items() if count} == {"._steps": 3}


# --- fast and plain forms are one computation


def make_trainer(fast, dims, ft_steps, ddim, **algorithm):
    if ddim:
        eta = EtaFixed(base_eta=0.7, min_eta=0.1, max_eta=1.0)
        algorithm |= {"use_ddim": True, "ddim_steps": 3, "eta": eta}
    with initial_weights(NoiseSource(3)):
        policy = DPPO(
            gamma_denoising=0.95,
            clip_ploss_coef=0.02,
            clip_ploss_coef_base=0.01,
            clip_ploss_coef_rate=3,
            actor=DiffusionMLP(A, H, O, 16, list(dims), activation_type="ReLU", residual_style=True),
            critic=CriticObs(O, list(dims), activation_type="Mish", residual_style=True),
            horizon_steps=H,
            obs_dim=O,
            action_dim=A,
            denoising_steps=K,
            randn_clip_value=3,
            ft_denoising_steps=ft_steps,
            **algorithm,
        )
    noise = NoiseSource(4)
    for variable in variables_of(policy.actor_ft):  # no longer a copy of the base network
        variable.assign_add(0.02 * noise.normal(variable.shape, np.float64))
    rates = {f"{n}_{k}": v for n in ("actor", "critic") for k, v in (("lr", 1e-2), ("weight_decay", 1e-3))}
    schedules = {f"{n}_lr_scheduler": SCHEDULE for n in ("actor", "critic")}
    return DPPOTrainer(policy, {"fast": fast, "vf_coef": 0.5, "max_grad_norm": 1.0} | rates | schedules, H)


def _normal(draw, *shape):
    return draw.normal(shape, np.float64)


@contextlib.contextmanager
def traced_only(fast):
    """The plain form need not be compiled to be compared with."""
    tf.config.run_functions_eagerly(not fast)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def largest_difference(one, other):
    assert len(one) == len(other) > 0
    return max(np.abs(a - b).max() if np.size(a) else 0.0 for a, b in zip(one, other, strict=True))


CASES = {
    "1 block, DDPM, some steps": {"dims": (16,) * 3, "ft_steps": 2, "ddim": False},
    "2 blocks, DDPM, all steps": {"dims": (16,) * 5, "ft_steps": 4, "ddim": False},
    "1 block, DDIM, all steps": {"dims": (16,) * 3, "ft_steps": 3, "ddim": True},
    "2 blocks, DDIM, some steps": {"dims": (16,) * 5, "ft_steps": 2, "ddim": True},
    "value clipping, advantage quantiles": {
        **{"dims": (16,) * 3, "ft_steps": 2, "ddim": False, "clip_vloss_coef": 0.2},
        **{"clip_advantage_lower_quantile": 0.1, "clip_advantage_upper_quantile": 0.9},
    },
}


@pytest.mark.parametrize("case", list(CASES)[:4])
def test_sampler_fast_equals_plain(case):
    with precision("float64"):
        draw, results = NoiseSource(1), []
        state = draw.normal((5, 1, O), np.float64)
        trainers = [make_trainer(fast, **CASES[case]) for fast in (True, False)]
        noise = draw.normal(trainers[0].actor.noise_shape(5), np.float64)
        for trainer, fast in zip(trainers, (True, False), strict=True):
            assert trainer.actor.fast == fast
            with traced_only(fast):
                exploring, evaluating = (
                    trainer.actor.act(state, noise, deterministic) for deterministic in (False, True)
                )
            with traced_only(False):  # captured while sampling = computed afterwards
                again = trainer.actor.log_probs(state, exploring.chains)
            assert largest_difference([exploring.log_probs], [again]) < SAME
            results.append([*exploring, *evaluating])
        assert results[0][0].dtype == np.float64 and largest_difference(*results) < SAME


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        ("1 block, DDPM, some steps", 12),
        ("1 block, DDPM, some steps", 64),
        ("2 blocks, DDPM, all steps", 67),
        ("1 block, DDIM, all steps", 12),
        ("2 blocks, DDIM, some steps", 65),
        ("value clipping, advantage quantiles", 67),
    ],
)
def test_updates_fast_equals_plain(case, rows, monkeypatch):
    """Three updates. N = 20 samples are more than 12 rows and fewer than the others; 65 and 67 rows leave padding."""
    monkeypatch.setattr(dppo_fast, "CHUNK", 16)  # several chunks
    assert chunks(64, 16)[2] == 0 and chunks(67, 16)[2] > 0
    n, results = 20, []
    with precision("float64"):
        for fast in (True, False):
            draw, trainer = NoiseSource(2), make_trainer(fast, **CASES[case])
            assert trainer.fast == fast
            f = trainer.policy.ft_denoising_steps
            normal = functools.partial(_normal, draw)
            chains = np.cumsum(0.1 * normal(n, f + 1, H, A), axis=1)
            n_rows = trainer.load(normal(n, 1, O), chains, normal(n), normal(n), normal(n), 0.3 * normal(n, f, H, A))
            losses = []
            for number in range(3):
                chosen = np.concatenate([draw.permutation(n_rows) for _ in range(2)])[:rows]
                with traced_only(fast):
                    losses.append(list(trainer.minibatch(chosen, True, number).values()))
            variables = [v for name in trainer.trained for v in trainer.trained[name]]
            results.append([np.array(losses), *(v.numpy() for v in variables), *trainer.tensors().values()])
            assert np.isfinite(losses).all() and np.abs(trainer.tensors()["optimizer.actor.exp_avg.0"]).max() > 0
    assert largest_difference(*results) < SAME


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("predict_epsilon", [True, False])
def test_pre_training_fast_equals_plain(blocks, predict_epsilon):
    draw, results = NoiseSource(1), []
    n, b, steps = 30, 8, 6
    states, actions = draw.normal((n, O), np.float64), draw.normal((n, A), np.float64)
    windows = np.stack([np.arange(n - H), np.arange(n - H) % 9], axis=1)
    items, t = draw.integers(0, n - H, (3, b)), draw.integers(0, steps, (3, b))
    noise = draw.normal((3, b, H, A), np.float64)
    average = np.array([COPY, KEEP, AVERAGE])
    for fast in (True, False):
        with precision("float64"), initial_weights(NoiseSource(2)):
            network = DiffusionMLP(
                A, H, 2 * O, 16, [16] * (1 + 2 * blocks), activation_type="ReLU", residual_style=True
            )
            policy = DiffusionPolicy(network, H, O, A, denoising_steps=steps, predict_epsilon=predict_epsilon)
            train = {
                "fast": fast,
                "lr_scheduler": SCHEDULE,
                "learning_rate": 1e-2,
                "weight_decay": 1e-3,
                "batch_size": b,
            }
            data = SimpleNamespace(states=states, actions=actions, indices=windows, cond_steps=2, images=None)
            trainer = PreTrainer(policy, data, train, 0.9)
            assert trainer.folds == fast
            with traced_only(fast):
                losses = trainer.steps(items, t, noise, average)
                held_out = trainer.evaluate(items[0], t[0], noise[0])
            results.append([losses, held_out, *(v.numpy() for v in [*trainer.variables, *trainer.averaged])])
    assert results[0][0].dtype == np.float64 and largest_difference(*results) < SAME
