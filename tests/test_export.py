"""Exported policies: the checkpoint's actions in a process that knows TensorFlow only; what cannot be exported."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from omegaconf import OmegaConf

import diffusion_rl
from diffusion_rl.cli.status import exit_status
from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.config.instantiate import instantiate
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.export import saved
from diffusion_rl.export.deployed import DeployedPolicy
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint
from diffusion_rl.training.policy_files import policy_facts

OBS, A, H, TA, TO = 5, 3, 4, 2, 2  # dimensions of observation and action; plan, executed part, history
SIZE = {"action_dim": A, "horizon_steps": H}
MLP = {"_target_": "diffusion_rl.networks.mlp.DiffusionMLP", **SIZE, "cond_dim": OBS * TO, "mlp_dims": [16, 16, 16]}
UNET = {
    "_target_": "diffusion_rl.networks.unet1d.Unet1D",
    "action_dim": A,
    "cond_dim": OBS * TO,
    "dim": 8,
    "dim_mults": [1, 2],
    "n_groups": 2,  # groups of few numbers magnify rounding, and so does a chain of few steps
}
SEEING = {
    "backbone": {
        "_target_": "diffusion_rl.networks.vit.VitEncoder",
        "cfg": {"depth": 1, "embed_dim": 8, "num_heads": 2, "embed_norm": 0},
        "num_channel": 6,
        "img_h": 16,
        "img_w": 24,
    },
    "cond_dim": OBS * TO,
    "img_cond_steps": 2,
    "num_img": 2,
    "spatial_emb": 8,
    "augment": True,
}
VISION = {"_target_": "diffusion_rl.networks.vision.VisionDiffusionMLP", **SIZE, **SEEING, "mlp_dims": [16, 16, 16]}
VISION_UNET = {**UNET, **SEEING, "_target_": "diffusion_rl.networks.vision_unet1d.VisionUnet1D"}
CRITIC = {"_target_": "diffusion_rl.networks.critics.CriticObs", "cond_dim": OBS * TO, "mlp_dims": [8]}
CRITIC_ACT = {**CRITIC, "_target_": "diffusion_rl.networks.critics.CriticObsAct", "action_dim": A, "action_steps": H}
GAUSSIAN = {**MLP, "_target_": "diffusion_rl.networks.gaussian.GaussianMLP", "mlp_dims": [16, 16]}
MIXTURE = {**GAUSSIAN, "_target_": "diffusion_rl.networks.gmm.GMMMLP", "num_modes": 3}

DDIM = {"use_ddim": True, "ddim_steps": 5, "eta": {"_target_": "diffusion_rl.networks.eta.EtaFixed"}}
DPPO = {
    "_target_": "diffusion_rl.methods.on_policy.dppo.DPPO",
    **{"horizon_steps": H, "obs_dim": OBS, "action_dim": A, "critic": CRITIC, "denoising_steps": 10},
    **{"gamma_denoising": 0.99, "clip_ploss_coef": 0.01, "ft_denoising_steps": 4, "randn_clip_value": 3},
}
PRE = {
    "_target_": "diffusion_rl.policies.diffusion.DiffusionPolicy",
    **{"horizon_steps": H, "obs_dim": OBS, "action_dim": A, "denoising_steps": 10},
}
FLOW = {"horizon_steps": H, "obs_dim": OBS, "action_dim": A}
VELOCITY = {**MLP, "_target_": "diffusion_rl.networks.flow.FlowMLP"}
ONE_STEP = {
    "_target_": "diffusion_rl.networks.flow.OneStepMLP",
    **{"horizon_steps": H, "action_dim": A, "cond_dim": OBS * TO, "mlp_dims": [16, 16]},
}
STEERED = {
    **FLOW,
    **{"network": VELOCITY, "noise_actor": {**GAUSSIAN, "tanh_output": False}, "critic": CRITIC_ACT},
    "sampling": {"inference_steps": 3},
}
SHORTCUT = {**MLP, "_target_": "diffusion_rl.networks.flow.ShortcutFlowMLP", "td_emb_dim": 4, "cond_mlp_dims": [6, 4]}
NOISY = {
    **{"horizon_steps": H, "obs_dim": OBS, "act_dim": A, "critic": CRITIC, "noise_scheduler_type": "learn"},
    **{"inference_steps": 3, "ft_denoising_steps": 3, "randn_clip_value": 3},
    **{"min_logprob_denoising_std": 0.1, "max_logprob_denoising_std": 0.2, "min_sampling_denoising_std": 0.1},
}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {**DPPO, "actor": MLP},
    "mlp ddim": {**DPPO, "actor": {**MLP, "residual_style": True}, **DDIM, "learn_eta": True},
    "pre-trained mlp": {**PRE, "network": {**MLP, "cond_mlp_dims": [8]}},
    "unet": {**PRE, "network": UNET, "denoising_steps": 20, "use_ddim": True, "ddim_steps": 2},
    "image mlp": {**DPPO, "actor": VISION, **DDIM},
    "image unet": {**PRE, "network": VISION_UNET, "denoising_steps": 20, "use_ddim": True, "ddim_steps": 2},
    "gaussian": {
        "_target_": "diffusion_rl.policies.gaussian.GaussianPolicy",
        **{"horizon_steps": H, "network": {**GAUSSIAN, "fixed_std": 0.1}},
    },
    "gaussian ppo": {
        "_target_": "diffusion_rl.methods.on_policy.gaussian_ppo.GaussianPPO",
        **{"horizon_steps": H, "actor": GAUSSIAN, "critic": CRITIC, "clip_ploss_coef": 0.1},
    },
    "sac": {
        "_target_": "diffusion_rl.methods.off_policy.sac.SAC",
        **{"horizon_steps": H, "actor": {**GAUSSIAN, "tanh_output": False}, "critic": CRITIC_ACT},
    },
    "mixture": {
        "_target_": "diffusion_rl.policies.gmm.GMMPolicy",
        **{"horizon_steps": H, "network": {**MIXTURE, "fixed_std": 0.1}},
    },
    "flow": {"_target_": "diffusion_rl.policies.flow.FlowPolicy", **FLOW, "network": VELOCITY},
    "shortcut": {"_target_": "diffusion_rl.policies.flow.ShortcutFlowPolicy", **FLOW, "network": SHORTCUT},
    "reinflow": {"_target_": "diffusion_rl.methods.on_policy.reinflow.ReinFlow", **NOISY, "policy": VELOCITY},
    "shortcut reinflow": {
        "_target_": "diffusion_rl.methods.on_policy.reinflow.ShortcutReinFlow",
        **{**NOISY, "policy": SHORTCUT},
    },
    "fpo": {
        "_target_": "diffusion_rl.methods.on_policy.fpo.FPO",
        **{**FLOW, "actor": VELOCITY, "critic": CRITIC, "clip_ploss_coef": 0.1},
    },
    "dsrl": {"_target_": "diffusion_rl.methods.off_policy.dsrl.DSRL", **STEERED},
    "fql": {
        "_target_": "diffusion_rl.methods.off_policy.fql.FQL",
        **{**FLOW, "actor": ONE_STEP, "flow": VELOCITY, "critic": CRITIC_ACT},
    },
}
FRESH = """
import sys
import numpy as np
import tensorflow as tf

for path, inputs, result in zip(*[iter(sys.argv[1:])] * 3):
    inputs = dict(np.load(inputs))
    if path.endswith(".tflite"):
        interpreter = tf.lite.Interpreter(path)
        assert not [op["op_name"] for op in interpreter._get_ops_details() if op["op_name"].startswith("Flex")]
        runs = {name: interpreter.get_signature_runner(name) for name in ("serving_default", "with_noise")}
    else:
        policy = tf.saved_model.load(path)
        runs = {name: policy.signatures[name] for name in ("serving_default", "with_noise")}
    given = {name: tf.constant(value) for name, value in inputs.items()}
    observation = {name: given[name] for name in given if name in ("state", "rgb")}
    if path.endswith(".tflite"):
        given, observation = ({k: v.numpy() for k, v in values.items()} for values in (given, observation))
    outputs = {f"{i} {k}": np.array(v) for i in range(2) for k, v in runs["serving_default"](**observation).items()}
    outputs |= {k: np.array(v) for k, v in runs["with_noise"](**given).items()}
    np.savez(result, **outputs)
assert not [name for name in sys.modules if name.startswith(("diffusion_rl", "torch", "omegaconf"))]
"""


def make_checkpoint(folder: Path, name: str, **metadata: Any) -> Path:
    """A checkpoint as the loops write it, of random weights; the base policy and the fine-tuned one differ."""
    model = MODELS[name]
    with initial_weights(NoiseSource(len(name))):
        policy = instantiate(OmegaConf.create(model))
    draw = NoiseSource(1)
    for variable in variables_of(getattr(policy, "actor_ft", policy.network)):
        variable.assign_add(0.05 * draw.normal(variable.shape))
    if hasattr(policy, "steering"):
        policy.steering.assign(1.0)
    normalization = {
        "obs_min": [-1.0, 0.0, 3.0, -10.0, 0.5],
        "obs_max": [1.0, 2.0, 3.1, 10.0, 0.5],
        "action_min": [-1.0, -0.5, -4.0],
        "action_max": [1.0, 0.7, 4.0],
    }
    config = {"obs_dim": OBS, "action_dim": A, "cond_steps": TO, "act_steps": TA, "horizon_steps": H, "model": model}
    facts = {"kind": "dppo" if "actor_ft" in vars(policy) else policy.KIND, **policy_facts(policy)}
    facts |= {"normalization": normalization, "config": config, **metadata}
    path = folder / "state_7.safetensors"
    save_checkpoint(path, {f"model.{k}": v for k, v in state_dict(policy).items()}, facts)
    return path


def in_a_fresh_process(exports: dict[Path, dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Outputs of exported policies for their inputs."""
    arguments, results = [], []
    for path, inputs in exports.items():
        given, result = path.with_suffix(".inputs.npz"), path.with_suffix(".outputs.npz")
        np.savez(given, **inputs)
        arguments += [str(path), str(given), str(result)]
        results.append(result)
    command = [sys.executable, "-I", "-c", FRESH, *arguments]
    done = subprocess.run(command, cwd=results[0].parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [dict(np.load(result)) for result in results]


QUICK = ("gaussian",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_the_checkpoints_actions_in_a_process_with_tensorflow_only(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path, name)
    source = saved.open_policy(checkpoint)
    exports = {}
    for file_format, batch in (("savedmodel", 3), ("tflite", 1)):
        written = saved.export_policy(checkpoint, file_format)
        assert written.path.parent == tmp_path and written.deviation <= 1e-5
        exports[written.path] = saved.random_inputs(source, batch, NoiseSource(9))
    for inputs, outputs in zip(exports.values(), in_a_fresh_process(exports), strict=True):
        expected = saved.decide(source, inputs)
        assert outputs["plan"].shape == (len(expected), H, A)
        np.testing.assert_allclose(outputs["plan"], expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(outputs["actions"], outputs["plan"][:, :TA])
        for draw in ("0 plan", "1 plan"):  # noise of its own, anew every time
            assert outputs[draw].shape == expected.shape and np.all(np.isfinite(outputs[draw]))
        assert np.any(outputs["0 plan"] != outputs["1 plan"])


DIFFUSING = {**PRE, "actor": MLP, "denoising_steps": 4, "randn_clip_value": 3}
DISTRIBUTIONAL = {**CRITIC_ACT, "_target_": "diffusion_rl.networks.critics.DistributionalCritic"}
SQUASHED = {**MODELS["sac"], "tanh_output": True}
SINGLE = {**SQUASHED, "critic": {**CRITIC_ACT, "double_q": False}, "n_critics": 2}
OFF_POLICY = {
    "rwr.RWR": {**PRE, "network": MLP, "denoising_steps": 4},
    "awr.AWR": {**DIFFUSING, "critic": CRITIC},
    "awr.GaussianAWR": {"horizon_steps": H, "actor": GAUSSIAN, "critic": CRITIC},
    **dict.fromkeys(("dipo.DIPO", "dql.DQL", "qsm.QSM"), {**DIFFUSING, "critic": CRITIC_ACT}),
    "dacer.DACER": {**DIFFUSING, "critic": DISTRIBUTIONAL},
    "sac.SAC": SQUASHED,
    "rlpd.RLPD": SINGLE,
    "dsrl.DSRL": STEERED,
    "fql.FQL": MODELS["fql"],
}


@pytest.mark.parametrize("name", OFF_POLICY)
def test_off_policy_algorithms_act_as_in_their_evaluations(tmp_path, monkeypatch, name):
    model = {**OFF_POLICY[name], "_target_": f"diffusion_rl.methods.off_policy.{name}"}
    monkeypatch.setitem(MODELS, name, model)
    path = make_checkpoint(tmp_path, name)
    algorithm = instantiate(OmegaConf.create(model))
    load_state_dict(algorithm, load_checkpoint(path).select("model."))
    source = saved.open_policy(path)
    inputs = saved.random_inputs(source, 3, NoiseSource(9))
    cond = {"state": tf.constant(source.normalizer.normalize_obs(inputs["state"]))}
    expected = algorithm.act(cond, {"noise": tf.constant(inputs["noise"])}, True, {})
    expected = source.normalizer.unnormalize_action(expected.numpy())
    np.testing.assert_allclose(saved.decide(source, inputs), expected, rtol=0, atol=1e-6)
    acted = diffusion_rl.load_policy(path).act({"state": inputs["state"]}, rng=NoiseSource(4))
    inputs["noise"] = NoiseSource(4).normal(inputs["noise"].shape)
    np.testing.assert_allclose(acted, saved.decide(source, inputs)[:, :TA], rtol=0, atol=1e-6)


def test_noise_drawn_inside_is_standard_normal(tmp_path):
    """A policy whose action is its noise: 10 actions of deviation 1e-4 around a mean that is known."""
    source = saved.open_policy(make_checkpoint(tmp_path, "gaussian"))
    inputs = saved.random_inputs(source, 1, NoiseSource(3))
    mean = saved.decide(source, inputs | {"noise": np.zeros_like(inputs["noise"])})
    scale = 1e-4 * (source.normalizer.action_max - source.normalizer.action_min) / 2
    for file_format, load in (("savedmodel", saved.load_saved_model), ("tflite", saved.load_tflite)):
        run = load(saved.export_policy(tmp_path / "state_7.safetensors", file_format).path)
        draws = [(run("serving_default", {"state": inputs["state"]})["plan"] - mean) / scale for _ in range(300)]
        assert abs(np.mean(draws)) < 0.1 and abs(np.std(draws) - 1) < 0.1


def test_the_image_is_encoded_once_for_a_decision(tmp_path):
    source = saved.open_policy(make_checkpoint(tmp_path, "image unet"))
    module = DeployedPolicy(source.policy, source.normalizer, TO, TA, batch=1)
    convolutions = [op for op in module.act.graph.get_operations() if op.type == "Conv2D"]
    assert len(convolutions) == 2 * SEEING["num_img"] and source.policy.sampling_steps > 1


def test_a_fine_tuned_policy_uses_as_many_steps_as_its_checkpoint_says(tmp_path):
    """The number is lowered in training (`ft_denoising_steps_d`): the configuration's is then not the policy's."""
    path = make_checkpoint(tmp_path, "mlp", ft_denoising_steps=2)
    assert saved.open_policy(path).policy.ft_denoising_steps == 2


def test_a_checkpoint_of_the_reference_with_a_configuration(tmp_path):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path, "mlp"))
    save_checkpoint(tmp_path / "x.pt", checkpoint.tensors, checkpoint.metadata)
    with pytest.raises(UserError, match="does not hold its configuration"):
        saved.open_policy(tmp_path / "x.pt")
    np.savez(tmp_path / "normalization.npz", **checkpoint.metadata["normalization"])
    config = {**checkpoint.metadata["config"], "normalization_path": str(tmp_path / "normalization.npz")}
    source = saved.open_policy(tmp_path / "x.pt", config)
    inputs = saved.random_inputs(source, 2, NoiseSource(0))
    ours = saved.open_policy(tmp_path / "state_7.safetensors")
    np.testing.assert_array_equal(saved.decide(source, inputs), saved.decide(ours, inputs))


def test_an_export_that_acts_otherwise_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path, "mlp ddim")
    monkeypatch.setattr(saved, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match="acts otherwise than the checkpoint, by .*nothing was written"):
        saved.export_policy(checkpoint, "savedmodel")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_what_is_there_is_replaced_by_force_only(tmp_path):
    checkpoint = make_checkpoint(tmp_path, "gaussian")
    for file_format in ("savedmodel", "tflite"):
        saved.export_policy(checkpoint, file_format)
        with pytest.raises(UserError, match="exists: .*--force"):
            saved.export_policy(checkpoint, file_format)
        saved.export_policy(checkpoint, file_format, force=True)
    (tmp_path / "mine").mkdir()
    for other in (tmp_path / "mine", checkpoint):
        with pytest.raises(UserError, match="is not an export"):
            saved.export_policy(checkpoint, "tflite", other, force=True)
    left = {"state_7.safetensors", "state_7.tflite", "state_7_savedmodel", "mine"}
    assert {path.name for path in tmp_path.iterdir()} == left


METHODS = "diffusion_rl.methods"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {**PRE, "_target_": "diffusion_rl.methods.on_policy.ppo.ClippedPPO"}},
            "of a ClippedPPO, which cannot be",
        ),
        (
            {"model": {**PRE, "_target_": "diffusion_rl.methods.off_policy.idql.IDQL"}},
            "of a IDQL, which cannot be exported",
        ),
        ({"model": {**PRE, "_target_": "os.system"}}, "of a system, which cannot be exported; these can: AWR, CalQL, "),
        ({"model": {**PRE, "network": {**MLP, "_target_": "os.system"}}}, "refused"),
        ({"model": {**PRE, "network": {**MLP, "cond_mlp_dims": [8], "mlp_dims": [7, 7, 7]}}}, "weight .* has shape"),
        ({"obs_dim": 6}, "its normalization is for obs_dim=5"),
        ({"model": None}, "does not hold its configuration"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, change, message):
    path = make_checkpoint(tmp_path, "pre-trained mlp")
    checkpoint = load_checkpoint(path)
    config = checkpoint.metadata["config"] | change
    with pytest.raises(UserError, match=message) as caught:
        saved.open_policy(path, config)
    assert "\n" not in str(caught.value)


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "code"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("file_format", "name"), [("savedmodel", "hopper"), ("tflite", "hopper.tflite")])
def test_the_command_and_the_example(tmp_path, file_format, name):
    shipped, output = "data/gym/hopper-medium-v2/pre_diffusion_mlp.safetensors", tmp_path / name
    done = command("script/export_policy.py", shipped, "--format", file_format, "--output", output)
    assert done.returncode == 0, done.stderr
    for text in ("state [", "noise [21,", "acts as the checkpoint does", "median", "p99", f"wrote {output}"):
        assert text in done.stdout
    shown = command("-I", "script/examples/act.py", output)
    assert shown.returncode == 0 and shown.stdout.count("[") >= 5, shown.stderr


def test_the_command_refuses_in_one_line_with_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.chdir(REPOSITORY)
    main = runpy.run_path("script/export_policy.py")["main"]
    shipped, other = "data/gym/hopper-medium-v2/pre_diffusion_mlp.safetensors", "data/gym/hopper-medium-v2/train.npz"
    for arguments, message in (
        ([shipped, "--format", "onnx"], "invalid choice: 'onnx' (choose from 'savedmodel', 'tflite')"),
        ([tmp_path / "gone.safetensors", "--format", "tflite"], "no checkpoint at"),
        ([other, "--format", "tflite"], r"a checkpoint is called"),
        ([shipped, "--format", "tflite", "model.use_ddim=true"], "name it with --config"),
    ):
        monkeypatch.setattr(sys, "argv", ["script/export_policy.py", *map(str, arguments)])
        assert exit_status(main) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_weights_are_stored_once(tmp_path):
    """Two signatures share them, and critics stay behind."""
    path = saved.export_policy(make_checkpoint(tmp_path, "mlp"), "savedmodel").path
    stored = tf.train.load_checkpoint(str(path / "variables" / "variables")).get_variable_to_shape_map()
    size = sum(int(np.prod(shape)) for name, shape in stored.items() if "VARIABLE_VALUE" in name)
    policy = saved.open_policy(tmp_path / "state_7.safetensors").policy
    assert size == sum(int(tf.size(v)) for net in (policy.actor, policy.actor_ft) for v in variables_of(net))
