"""Options of the planners, DiffuserLite, VAE + Diffusion RL and the runner that cannot work are one line each.

They are refused by the reader of their program's options, before data, networks or folders are touched.
"""

from __future__ import annotations

import pytest
import yaml

from diffusion_rl.cli import commands, diffuser, diffuser_lite, experiments, kuka, launchers, vae
from diffusion_rl.cli.status import exit_status

WHOLE = ("0", "-1", "1.5", "abc", "inf", "nan", "None", "9" * 5000)
RATE = ("0", "-1", "inf", "nan", "abc", "None")
TRAIN = {
    **dict.fromkeys(("horizon", "n_diffusion_steps", "batch_size", "gradient_accumulate_every", "save_freq"), WHOLE),
    **dict.fromkeys(("n_steps_per_epoch", "n_saves", "max_path_length"), ("0", "-1", "1.5", "inf")),
    **dict.fromkeys(("learning_rate", "lr_scale"), RATE),
    "n_train_steps": ("0", "-5", "1.5", "nan", "1e13"),
    "sample_freq": ("-1", "x"),
    "seed": ("-1", "1.5", "abc", str(2**63)),
    "ema_decay": ("-0.1", "1.1", "nan"),
    "dim_mults": ("()", "(0,)", "(1, 2.5)", "abc", "(1, 'a')", "{[1]}", "(" * 5000),
    "attention": ("yes", "3", "None", "latest", "'x'"),
    "loss_type": ("l3", "None"),
    "diffusion_type": ("states",),
    "obs_embed": ("conv",),
    "loss_weights": ("3", "{'a': 1}", "{0: -1}", "{-1: 1}"),
    "device": ("tpu", "cuda:x"),
    "prefix": ("../x", "/etc/x", "a/../../x", "x" * 300, "a\nb"),
    "exp_name": ("../../x", "/tmp/x"),
    "dataset": ("../x", "/etc"),
    "horizn": ("4",),
    "config": ("none.yaml", "config.none"),
    "preset": ("none",),
}
PLAN = {
    **dict.fromkeys(("n_envs", "max_episode_length", "vis_freq", "batch_size"), ("0", "-1", "abc", "1000000000")),
    "max_episode_length": ("0", "-1", "2000000000"),
    "vis_freq": ("0", "-1"),
    "n_exec": ("0", "33"),
    "scale": ("nan", "inf", "x"),
    "t_stopgrad": ("-1",),
    "aggregate": ("best",),
    "suffix": ("../0", "/0"),
}
LITE = {
    **dict.fromkeys(("batch_size", "log_interval", "save_interval", "diffusion_gradient_steps"), WHOLE[:-2]),
    **dict.fromkeys(("num_envs", "num_episodes", "cond_dataset_size", "keep_every"), ("0", "-1", "1.5", "abc")),
    **dict.fromkeys(("learning_rate", "reflow_lr"), ("0", "-1e-3", ".inf", ".nan", "null", "x", "1e-400")),
    "num_envs": ("0", "1000000000"),
    "seed": ("-1", "2001-99-99", "true", "9" * 5000, "[1", "&a [*a]", "null"),
    "discount": ("1.1", "-1"),
    "n_heads": ("0", "3"),
    "emb_dim": ("12", "0"),
    "d_model": ("15", "0"),
    "use_ema": ("1", "maybe"),
    "mode": ("train", ""),
    "test_model": ("R3",),
    "backbone": ("unet",),
    "resume": ("maybe", "-1", "1.5"),
    "diffusion_ckpt": ("../../x", "-1", "newest"),
    "invdyn_ckpt": ("all",),
    "device": ("tpu",),
    "pipeline_name": ("../x", "/etc"),
    "task.env_name": ("foo-v2", "../hopper-medium-v2", "kitchen-mixed-v0"),
    "task.w_cfg_R1": ("abc", ".nan"),
    "task.none": ("1",),
    "task": ("none", "../task/hopper-medium-v2"),
    "sed": ("1",),
}
VAE = {
    **dict.fromkeys(
        ("save_freq", "log_freq", "batch_size", "n_train_steps", "num_eval"), (0, -1, 1.5, "x", None, True)
    ),
    **dict.fromkeys(("rl_collect_freq", "rl_update_freq", "update_ema_every", "rl_num_envs"), (0, -1)),
    **dict.fromkeys(("learning_rate", "vae_learning_rate", "rl_learning_rate"), (0, -1, float("inf"), float("nan"))),
    **dict.fromkeys(("num_envs", "rl_batch_size"), (0, 10**9)),
    "seed": (-1, 1.5, "abc", 10**400),
    "horizon": (0, -1, 10**9),
    "act_steps": (0, 5),
    "eval_freq": (-1, 15),
    "discount": (-0.1, 1.1),
    "returns_scale": (0, -1),
    "time_embed_dim": (0, 20),
    "trajectory_hidden_dim": (0, 30),
    "backbone_hidden_dim": (0, 30),
    "ft_denoising_steps": (0, 201, "x"),
    "target_kl": (-1, "x"),
    "data_dir": (3,),
    "wandb": (3, "x"),
    "job_name": ("{nothing}", "{seed:>99999999999}", "{seed:{horizon}}", "{seed", "{}", "{data_dir:>5}", "../x", "/x"),
    "exp_name": ("../x", "/etc/x"),
    "trainer": ("os.system",),
    "batchsize": (1,),
}
RUNNER = {
    "": ("meta_data: 3", "- 1", "a: 1", "a: &a {b: *a}", "a: !!int abc"),
    "meta_data": ("{exp_name: x}", "{exp_name: ../x, script_path: s.py}", "{exp_name: x, script_path: none.py}"),
    "num_workers": ("0.5", "-1", "abc", "1000000000"),
    "variables": ("3", "{a: 3}", "{a: []}", "{" + ", ".join(f"a{i}: [1, 2, 3, 4]" for i in range(20)) + "}"),
    "constants": ("3", "[1]"),
    "arguments": ("some", "[1]"),
}


def cases(table):
    return [pytest.param(key, value, id=f"{key}={str(value)[:30]}") for key in table for value in table[key]]


def refused(command, arguments, capsys, folder):
    """It ends with one line and status 2, and has written nothing."""
    before = sorted(folder.rglob("*"))
    assert exit_status(lambda: command(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 700
    assert sorted(folder.rglob("*")) == before
    return err


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.mark.parametrize(("key", "value"), cases(TRAIN))
def test_training_of_diffuser(key, value, capsys, tmp_path):
    line = refused(diffuser.train, [f"--{key}", value], capsys, tmp_path)
    assert key in line or key == "exp_name"


@pytest.mark.parametrize(("key", "value"), cases(PLAN))
def test_plans_of_diffuser(key, value, capsys, tmp_path):
    assert key in refused(diffuser.plan_guided, [f"--{key}", value], capsys, tmp_path)


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (diffuser.train, ["--horizon"], "has no value"),
        (diffuser.train, ["--horizon", "4", "--horizon", "8"], "--horizon stands twice (4 and 8)"),
        (diffuser.train, ["--horizon", "6"], "halves the horizon"),
        (diffuser.train_values, ["--discount", "2"], "--discount 2.0: a number from 0 to 1"),
        (diffuser.plan_unguided, ["--n_envs", "2000", "--batch_size", "2000"], "plans are made together"),
        (diffuser.plan_maze2d, ["--replan_every", "-1"], "--replan_every -1"),
        (diffuser.plan_maze2d, ["--n_episodes", "0"], "--n_episodes 0"),
        (kuka.train, ["--dim", "12"], "dim must be a multiple of 8"),
        (kuka.train_classifier, ["--hidden_dims", "[0]"], "--hidden_dims [0]"),
        (kuka.plan, ["--n_plans", "0"], "--n_plans 0"),
        (kuka.plan, ["--task", "none"], "--task none"),
        (launchers.main, ["slurm", "--trials", "0"], "--trials 0"),
        (launchers.main, ["slurm", "--dry_run", "None"], "--dry_run None"),
        (commands.read_results, ["--logbase", "none"], "*/*/rollout.json of hopper-medium-replay-v2"),
        (commands.read_results, ["--logbse", "none"], "--logbse is no option"),
        (diffuser_lite.mujoco, ["seed=1", "seed=2"], "seed stands twice (1 and 2)"),
        (diffuser_lite.mujoco, ["seed"], "key=value"),
        (diffuser_lite.kitchen, ["num_envs=5000", "num_candidates=5000"], "plans are made together"),
        (diffuser_lite.antmaze, ["noreaching_penalty=.nan"], "noreaching_penalty=nan"),
    ],
)
def test_other_commands(command, arguments, said, capsys, tmp_path):
    assert said in refused(command, arguments, capsys, tmp_path)


@pytest.mark.parametrize(("key", "value"), cases(LITE))
def test_diffuser_lite(key, value, capsys, tmp_path):
    task = [] if key.startswith("task") and "." not in key else ["task=hopper-medium-v2"]
    assert key in refused(diffuser_lite.mujoco, [*task, f"{key}={value}"], capsys, tmp_path)


@pytest.mark.parametrize(("key", "value"), cases(VAE))
def test_vae(key, value, capsys, tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({key: value, "online_training": False}))
    refused(vae.train, ["-e", "s.yaml"], capsys, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"log_dir": 3},
        {"log_dir": "none"},
        {"load_steps": "x"},
        {"load_steps": [-1]},
        {"num_envs": 0},
        {"num_eval": 10**9},
    ]
    + [{"n_ddim_steps": 0}, {"overwrite": 3}, {"none": 1}, {"load_steps": None}],
)
def test_evaluations_of_vae(change, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({"log_dir": "run", "load_steps": [4], **change}))
    refused(vae.evaluate, ["-e", "e.yaml"], capsys, tmp_path)


@pytest.mark.parametrize(("key", "value"), cases(RUNNER))
def test_runner(key, value, capsys, tmp_path):
    (tmp_path / "s.py").touch()
    parts = {"meta_data": "{exp_name: x, script_path: s.py}", "variables": "{a: [1]}", "constants": "{b: 1}"}
    if key in ("num_workers", "arguments"):
        parts["meta_data"] = f"{{exp_name: x, script_path: s.py, {key}: {value}}}"
    elif key:
        parts[key] = value
    text = "\n".join(f"{name}: {part}" for name, part in parts.items()) if key else value
    (tmp_path / "s.yaml").write_text(text)
    refused(experiments.main, ["-e", "s.yaml"], capsys, tmp_path)


@pytest.mark.parametrize("command", [experiments.main, vae.train, vae.evaluate])
@pytest.mark.parametrize(
    "arguments",
    [[], ["-e"], ["-e", "a", "-e", "b"], ["-e", "a", "--gp", "1"], ["-e", "a", "-g", "x"], ["a"], ["-e", "none.yaml"]],
    ids=" ".join,
)
def test_flags(command, arguments, capsys, tmp_path):
    refused(command, arguments, capsys, tmp_path)


def test_an_own_configuration_of_the_planners(capsys, tmp_path):
    options = {"logbase": "logs", "horizon": 4}
    own = {"watch": [["prefix", ""]], "options": options}
    for settings, said in (
        ([1], "a mapping of experiments"),
        ({"a": 1}, "has no experiment 'diffusion'"),
        ({"diffusion": 3}, "needs watch"),
        ({"diffusion": {**own, "watch": [1]}}, "needs watch"),
        ({"diffusion": {**own, "options": [1]}}, "needs options"),
        ({"diffusion": {**own, "options": {"horizon": 4}}}, "logbase"),
        ({"diffusion": {**own, "options": {**options, "horizon": "x"}}}, "horizon: x must be like"),
        ({"diffusion": own, "presets": [1]}, "presets must be mappings"),
        ({"diffusion": own, "overrides": {"x": 3}}, "overrides must be mappings"),
        ({"diffusion": own}, "needs the option"),
    ):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
        assert said in refused(diffuser.train, ["--config", "own.yaml"], capsys, tmp_path)
