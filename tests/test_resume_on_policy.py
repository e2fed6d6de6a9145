"""PPO of Gaussian and mixture policies, with exact likelihood, and DPOER: resumed is the same as never stopped."""

import shutil

import numpy as np
import pytest
from tests.small_runs import (
    DIMS,
    EVALUATE,
    FINE_TUNE,
    SMALL,
    assert_same_checkpoint,
    loop,
    make_base_policy,
    make_data,
    rows,
    run,
)

from diffusion_rl.training.checkpoint import load_checkpoint

EXACT = "gym/finetune/hopper-v2/ft_ppo_exact_diffusion_mlp"
DPOER = "gym/finetune/hopper-v2/ft_sac_ppo_diffusion_mlp"
GAUSSIAN = "gym/scratch/hopper-v2/ppo_gaussian_mlp"
PRE_GAUSSIAN = "gym/pretrain/hopper-medium-v2/pre_gaussian_mlp"
EVALUATE_GAUSSIAN = "gym/eval/hopper-v2/eval_gaussian_mlp"

ENVS = ["env.n_envs=4", "env.max_episode_steps=28", "train.n_steps=24"]  # some episodes end
MIXTURE = [
    *(
        "model._target_=diffusion_rl.methods.on_policy.gmm_ppo.GMMPPO",
        "+model.actor.num_modes=3",
        "~model.randn_clip_value",
    ),
    "model.actor._target_=diffusion_rl.networks.gmm.GMMMLP",
]
CORRECTED = ["+model.mode=corrected", "+model.entropy_states=2"]
VARIANTS = {
    "Gaussian": (GAUSSIAN, ["+train.max_grad_norm=1"]),
    "imitating Gaussian": (GAUSSIAN, ["+train.use_bc_loss=true", "+train.bc_loss_coeff=0.1"]),
    "mixture": (GAUSSIAN, [*MIXTURE, "+train.ent_coef=0.01"]),
    "exact": (EXACT, ["model.sde_step_size=0.25"]),
    "plain exact": (EXACT, ["model.sde_step_size=0.25", "+train.fast=false", "model.sde_hutchinson_type=Gaussian"]),
    "DPOER": (DPOER, ["+model.entropy_refresh_interval=3", "+model.entropy_rows=8"]),
    "corrected DPOER": (DPOER, CORRECTED),
}
for _name in (EXACT, DPOER):
    SMALL[_name] = SMALL[FINE_TUNE]
SMALL[GAUSSIAN] = [o for o in SMALL[FINE_TUNE] if "denoising" not in o]
SMALL[PRE_GAUSSIAN] = [
    *(f"model.network.{DIMS}", "train.batch_size=32", "train.n_epochs=4", "train.save_model_freq=1"),
    *("+train.epoch_start_ema=2", "+train.update_ema_freq=2", "+tensorboard=false"),
]
SMALL[EVALUATE_GAUSSIAN] = [o for o in SMALL[EVALUATE] if "denoising" not in o]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """variant -> (configuration, overrides, folder) of an uninterrupted run of four iterations."""
    folder, done = tmp_path_factory.mktemp("whole"), {}

    def run_once(variant):
        if variant not in done:
            name, overrides = VARIANTS[variant]
            overrides = [*ENVS, *overrides, "train.save_model_freq=1"]
            if name != GAUSSIAN:
                overrides.append(f"base_policy_path={make_base_policy(folder / f'{variant}.safetensors')}")
            run(name, folder / variant, *overrides)
            done[variant] = (name, overrides, folder / variant)
        return done[variant]

    return run_once


def state(folder, n):
    return folder / "checkpoint" / f"state_{n}.safetensors"


# What is written is what the fast and the published form, the Gaussian and DPPO write.
LONG = {"plain exact", "corrected DPOER", "DPOER", "exact", "mixture"}
every_variant = pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * (v in LONG)) for v in VARIANTS]
)


@every_variant
def test_resumed_equals_at_once(tmp_path, whole, variant):
    name, overrides, folder = whole(variant)
    halves = tmp_path / "halves"
    shutil.copytree(folder, halves)
    for n in (2, 3):
        state(halves, n).unlink()
    run(name, halves, *overrides, "resume=auto")
    assert rows(halves) == rows(folder)
    assert_same_checkpoint(state(folder, 3), state(halves, 3))


@every_variant
def test_the_variants_train(whole, variant):
    _, _, folder = whole(variant)
    assert [row["kind"] for row in rows(folder)] == ["eval", "train", "train", "eval"]
    first, last = (load_checkpoint(state(folder, n)).tensors for n in (0, 3))
    moved = {name.split(".")[1] for name in first if name.startswith("model.") and np.any(first[name] != last[name])}
    assert {"actor_ft", "critic"} <= moved
    assert ("network" in moved) == (variant in ("Gaussian", "imitating Gaussian", "mixture"))  # there it is the actor
    assert "actor" not in moved  # the frozen copy
    losses = rows(folder)[1]
    assert losses["v_loss"] > 0 and losses["updates"] > 2
    if "DPOER" in variant:
        temperatures = [row["temperature"] for row in rows(folder)]
        assert temperatures[0] == pytest.approx(0.272) and temperatures[1] != temperatures[2]
        assert np.isfinite([row["entropy"] for row in rows(folder)]).all()


@pytest.mark.parametrize("variant", ["Gaussian", "mixture"])
def test_what_was_saved_evaluates_to_what_the_training_evaluated(tmp_path, whole, variant):
    _, overrides, folder = whole(variant)
    network = ["model.network.activation_type=ReLU", "model.network.fixed_std=null"]
    if variant == "mixture":
        network += ["model._target_=diffusion_rl.policies.gmm.GMMPolicy", "+model.network.num_modes=3"]
        network.append("model.network._target_=diffusion_rl.networks.gmm.GMMMLP")
    same = [o for o in overrides if o.startswith(("env.n_envs", "env.max_episode_steps"))]
    chosen = [f"base_policy_path={state(folder, 3)}", "n_steps=24", *same, *network]
    stats = loop(EVALUATE_GAUSSIAN, tmp_path, *chosen).run()
    trained, (alone,) = rows(folder)[3], rows(tmp_path)
    assert trained["kind"] == "eval" and stats.n_episodes >= 4
    for key in ("episodes", "episode_return", "best_reward"):
        assert alone[key] == trained[key], key


@pytest.mark.parametrize("mixture", [False, True])
def test_pre_trained_policies_resume_evaluate_and_are_fine_tuned(tmp_path, mixture):
    policy = ["model._target_=diffusion_rl.policies.gmm.GMMPolicy"] if mixture else []
    network = ["_target_=diffusion_rl.networks.gmm.GMMMLP"] if mixture else []
    overrides = [f"train_dataset_path={make_data(tmp_path / 'train.npz')}", *policy]
    overrides += [f"model.network.{o}" for o in network]
    run(PRE_GAUSSIAN, tmp_path / "whole", *overrides)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    for n in (3, 4):
        state(tmp_path / "halves", n).unlink()
    run(PRE_GAUSSIAN, tmp_path / "halves", *overrides, "resume=auto")
    trained = state(tmp_path / "whole", 4)
    assert_same_checkpoint(trained, state(tmp_path / "halves", 4))

    base = f"base_policy_path={trained}"
    evaluation = loop(EVALUATE_GAUSSIAN, tmp_path / "eval", base, *policy, *(f"model.network.{o}" for o in network))
    actor = ["model.actor.activation_type=Mish", "+model.actor.fixed_std=0.1", *(f"model.actor.{o}" for o in network)]
    actor += [MIXTURE[0], MIXTURE[2]] if mixture else []
    tuned = loop(GAUSSIAN, tmp_path / "tuned", f"+model.network_path={trained}", *actor).model
    weights = load_checkpoint(trained).tensors
    name = "network.mlp_mean.moduleList.0.linear_1.weight"
    # the last weights, not their average, as in the reference
    assert np.any(weights[f"ema.{name}"] != weights[f"model.{name}"])
    for filled in [evaluation.policy.network, tuned.actor_ft] + ([] if mixture else [tuned.actor]):
        np.testing.assert_array_equal(filled.mlp_mean.layers[0].linear.kernel, weights[f"model.{name}"].T)
    assert evaluation.run() is not None
