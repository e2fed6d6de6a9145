"""Command lines of script/run.py that cannot work: one line, status 2, nothing written. Other programs have theirs."""

import pytest

from diffusion_rl.cli import app

HOPPER = ("--config-dir=cfg/gym/finetune/hopper-v2", "--config-name=ft_ppo_diffusion_mlp")
PRE = ("--config-dir=cfg/gym/pretrain/hopper-medium-v2", "--config-name=pre_diffusion_mlp")
EVALUATE = ("--config-dir=cfg/gym/eval/hopper-v2", "--config-name=eval_diffusion_mlp")
DQL = ("--config-dir=cfg/gym/finetune/hopper-v2", "--config-name=ft_dql_diffusion_mlp")

NUMBERS = {
    HOPPER: {
        "train.n_steps": "0 -1 1.5 .inf .nan text true 1000000000000",
        "train.batch_size": "0 -1 2.5 .inf",
        "train.n_train_itr": "0 -3 .inf",
        "train.update_epochs": "0 -1",
        "train.val_freq": "0 -1 0.5",
        "train.save_model_freq": "0 -1",
        "train.gamma": "-0.1 1.5 .nan high",
        "train.gae_lambda": "2 -1",
        "train.actor_lr": "-1 .nan .inf",
        "train.critic_lr": "-1e-3 .nan",
        "train.actor_weight_decay": "-1 .inf",
        "train.target_kl": "0 -1 .nan",
        "train.vf_coef": "-1 .nan",
        "train.max_grad_norm": "0 -1",
        "train.n_critic_warmup_itr": "-1 0.5",
        "train.reward_scale_const": ".nan .inf",
        "train.actor_lr_scheduler.first_cycle_steps": "0 -1",
        "train.actor_lr_scheduler.warmup_steps": "-1 1000",
        "train.actor_lr_scheduler.min_lr": "-1 .nan",
        "act_steps": "0 -1 8",
        "horizon_steps": "0 -4 2 100000",
        "cond_steps": "0 -1",
        "obs_dim": "0 -1 10000001",
        "action_dim": "0 -3",
        "denoising_steps": "0 -1 5",
        "ft_denoising_steps": "-1 21 1.5",
        "seed": "-1 1.5 text",
        "env.n_envs": "0 -1 1000000000",
        "env.max_episode_steps": "0 -1",
        "env.threads": "0 -1 100000",
        "model.gamma_denoising": "-1 2",
        "model.clip_ploss_coef": "-0.1 .nan",
        "model.randn_clip_value": "0 -1",
        "model.ddim_steps": "0 21",
        "model.actor.mlp_dims": "[] [0] [-1,16] [16,1.5] 16",
        "model.critic.mlp_dims": "[0,16]",
        "model.actor.time_dim": "0 -16",
    },
    PRE: {
        "train.n_epochs": "0 -1 .inf",
        "train.batch_size": "0 -1",
        "train.learning_rate": "-1 .nan",
        "train.save_model_freq": "0",
        "train.update_ema_freq": "0 -1",
        "train.epoch_start_ema": "-1",
        "train.train_split": "0 -0.5 1.5",
        "ema.decay": "-0.1 1.1 .nan",
        "train_dataset.max_n_episodes": "0 -1",
    },
    EVALUATE: {"n_steps": "0 -1 1.5", "render_num": "-1", "env.n_envs": "0", "ft_denoising_steps": "-1"},
    DQL: {
        "train.replay_ratio": "0 -1 .nan",
        "train.buffer_size": "0 -1",
        "train.target_ema_rate": "-0.1 1.5",
        "train.eta": ".nan",
        "train.scale_reward_factor": ".inf",
    },
}
WORDS = {
    HOPPER: (
        *("train.batchsize=3", "batch_size=3", "nope=1", "train=3", "env=x", "use_ddim=true", "ddim_steps=5"),
        *("+train.max_adv_weight=3", "train.beta=1", "env.reward_shaping=true", "model.use_ddim=maybe"),
        *("env.save_video=perhaps", "device=gpux", "device=cuda:x", "--sed=1", "seed=[1", "~nope", "~train.gama"),
        *("obs_dim=???", "obs_dim=${nope}", "obs_dim=${eval:open}", "model._target_=subprocess.Popen"),
        *("model._target_=os.system", "model.critic._target_=nobody.Critic", "_target_=threading.Thread"),
        *("model.critic._target_=diffusion_rl.core.errors.UserError", "model.clip_plos=1", "_target_=3"),
        *("base_policy_path=/nowhere/x.safetensors", "base_policy_path=/tmp", "base_policy_path=README.md"),
        *("normalization_path=/nowhere.npz", "normalization_path=README.md", "resume=/nowhere", "env.name=hoper-v2"),
        *("env.engine=unreal", "env.wrappers.multi_step.n_action_steps=3", "n_steps=5", "train.augment=perhaps"),
    ),
    PRE: ("train_dataset_path=/nowhere.npz", "train_dataset_path=README.md", "train.gamma=0.9"),
    EVALUATE: ("base_policy_path=x=y", "train.gamma=1", "obs_dim=12", "update_epochs=1"),
}
CASES = [
    (config, f"{key}={value}")
    for config, table in NUMBERS.items()
    for key, values in table.items()
    for value in values.split()
]
CASES += [(config, word) for config, words in WORDS.items() for word in words]


@pytest.fixture(autouse=True)
def no_logging_set_up(monkeypatch):
    """Setting logging up anew closes the handlers there are, absl's with the stderr that pytest captures."""
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)
    monkeypatch.setattr("hydra._internal.logging_config.configure_logging", lambda config: None, raising=False)


def test_there_are_enough():
    assert len(CASES) >= 150


@pytest.mark.parametrize(("config", "change"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_one_line_and_nothing_written(config, change, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("DPPO_LOG_DIR", str(tmp_path))
    status = app.main([*config, change])
    out, err = capfd.readouterr()
    assert status == 2, (out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 900, err
    assert not list(tmp_path.iterdir()), "something was written"


OWN = "# @package _global_\ndefaults: [/gym/finetune/hopper-v2/ft_ppo_diffusion_mlp, _self_]\n"
NINES = "".join(f"    a{i}: &a{i} {{" + ", ".join(f"k{j}: *a{i - 1}" for j in range(9)) + "}\n" for i in range(1, 12))
FILES = {
    "callback": (
        OWN + "hydra: {callbacks: {a: {_target_: subprocess.Popen, args: [touch, PWNED]}}}",
        "may not name this",
    ),
    "handler": (
        OWN + "hydra: {job_logging: {handlers: {h: {'()': os.system, command: touch PWNED}}}}",
        "may not name this",
    ),
    "launcher": (OWN + "hydra: {launcher: {_target_: evil.Launcher}}", "may not name this"),
    "tag": (OWN + "a: !!int abc", "is not valid YAML"),
    "python": (OWN + "a: !!python/object/apply:os.system [touch PWNED]", "is not valid YAML"),
    "itself": (OWN + "a: &a {b: *a}", "an alias stands within what it names"),
    "nines": (OWN + "env:\n  specific:\n    a0: &a0 {x: 1}\n" + NINES, "more than 100000 values"),
    "deep": (OWN + "env: {specific: {a: " + "[" * 3000 + "]" * 3000 + "}}", "levels deep"),
    "list": ("- 1\n- 2\n", "is no configuration"),
    "empty": ("", "no _target_"),
    "torn": ("a: [1\n b: }", "is not valid YAML"),
    "binary": (b"\xff\xfe\x00abc", "is not valid YAML"),
    "beside": ("defaults: [other, _self_]\nseed: 1\n", "other.yaml: an alias stands within"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_configurations(kind, tmp_path, monkeypatch, capfd):
    content, message = FILES[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cfg").mkdir()
    (tmp_path / "cfg/other.yaml").write_text("a: &a {b: *a}")
    (tmp_path / "cfg/mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    status = app.main(["--config-dir=cfg", "--config-name=mine"])
    err = capfd.readouterr().err
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["cfg"]
