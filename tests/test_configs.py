"""Every shipped configuration composes and builds; mistakes on the command line get one clear line and status 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffusion_rl.cli import app
from diffusion_rl.cli.status import line_for_user
from diffusion_rl.config import command_line
from diffusion_rl.config.compose import CONFIG_ROOT, REPOSITORY, compose, compose_job, plain_copy, shipped_configs
from diffusion_rl.config.instantiate import calc, find_class, flatten, instantiate, instantiate_trusted, targets
from diffusion_rl.config.keys import KEYS, check_arguments, check_keys
from diffusion_rl.config.targets import CHECKPOINT_CLASSES
from diffusion_rl.core.errors import Interrupted, UserError
from diffusion_rl.methods.diffuser import options as diffuser
from diffusion_rl.methods.diffuser_lite import options as diffuser_lite
from diffusion_rl.methods.vae_latent import options as vae_latent
from diffusion_rl.training.policy_files import evaluation_of
from diffusion_rl.training.run_dir import RunDir
from diffusion_rl.training.state_files import StateFiles

HOPPER = ["--config-dir=cfg/gym/finetune/hopper-v2", "--config-name=ft_ppo_diffusion_mlp"]
PARAMETERS = json.loads((REPOSITORY / "parity_tests/goldens/config_parameters.json").read_text())


def composed(name, overrides=()):
    config = compose(name, overrides)
    del config.hydra
    return config


def hopper(*overrides):
    return composed("gym/finetune/hopper-v2/ft_ppo_diffusion_mlp", overrides)


def n_parameters(network):
    return sum(int(v.shape.num_elements()) for v in network.trainable_variables)


# Every shipped configuration


@pytest.mark.parametrize("name", shipped_configs())
def test_keys_arguments_and_classes_are_known(name):
    config = composed(name)
    assert all(find_class(mapping["_target_"]) for _, mapping in targets(config))
    prepared = OmegaConf.to_container(app.prepare(config), resolve=False)
    check_arguments({"model": prepared["model"]})


@pytest.mark.parametrize("name", shipped_configs())
def test_the_model_builds_with_the_references_number_of_parameters(name):
    config = composed(name)
    model = instantiate(config.model)
    for dimension in ("horizon_steps", "obs_dim", "action_dim"):  # Gaussian policies know the first only
        assert getattr(model, dimension, config[dimension]) == config[dimension]
    for part, count in PARAMETERS.get(name, {}).items():
        assert n_parameters(getattr(model, part)) == count, part


def test_parameter_counts_are_of_shipped_configurations():
    assert set(PARAMETERS) < set(shipped_configs())


def test_a_configuration_file_is_short_and_composed():
    for name in shipped_configs():
        text = (CONFIG_ROOT / f"{name}.yaml").read_text()
        assert text.startswith("# @package _global_\n") and "defaults:" in text, name
        assert len(text.splitlines()) <= 20, name


def test_every_listed_key_has_a_meaning():
    assert all(KEYS.values())


# The reference's command lines


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("seed=1", "seed", 1),
        ("wandb=null", "wandb", None),
        ("+wandb.mode=disabled", "wandb", None),
        ("++env.n_envs=1", "env.n_envs", 1),
        ("ft_denoising_steps=5", "model.ft_denoising_steps", 5),
        ("base_policy_path=x.pt", "model.network_path", "x.pt"),
        ("act_steps=2", "env.wrappers.multi_step.n_action_steps", 2),
        ("cond_steps=3", "model.actor.cond_dim", 33),
        ("train.n_train_itr=3", "train.n_train_itr", 3),
        ("train.target_kl=0.5", "train.target_kl", 0.5),
        ("+train.use_bc_loss=true", "train.use_bc_loss", True),
        ("resume=auto", "resume", "auto"),
        ("_base/task=walker2d-medium", "model.obs_dim", 17),
    ],
)
def test_overrides(override, key, value):
    assert flatten(app.prepare(hopper(override)))[key] == value


def test_optional_keys_that_are_read_get_their_defaults():
    found = flatten(app.prepare(hopper("~resume", "~train.gae_lambda")))
    wanted = {"resume": "never", "tensorboard": True, "train.fast": True, "train.gae_lambda": 0.95}
    assert wanted.items() <= found.items()
    assert "train.max_grad_norm" not in found and "train.train_split" not in found and "render_num" not in found
    found = flatten(app.prepare(composed("gym/pretrain/hopper-medium-v2/pre_diffusion_mlp")))
    assert (found["train.train_split"], found["train.val_freq"], found["env"]) == (1, 100, "hopper-medium-v2")
    assert "train.gae_lambda" not in found and "env.save_video" not in found
    assert app.prepare(hopper("++train.fast=false")).train.fast is False


def test_a_loop_of_ones_own_gets_what_its_file_says():
    assert "fast" not in app.prepare(hopper("_target_=own_package.Loop")).train


def test_evaluation_takes_the_number_of_fine_tuned_steps():
    config = composed("gym/eval/hopper-v2/eval_diffusion_mlp", ["ft_denoising_steps=10"])
    assert config.model.ft_denoising_steps == 10


def test_folders_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("DPPO_DATA_DIR", "/elsewhere/data")
    monkeypatch.setenv("DPPO_LOG_DIR", "/elsewhere/log")
    config = app.prepare(hopper())
    assert config.normalization_path == "/elsewhere/data/gym/hopper-medium-v2/normalization.npz"
    assert config.logdir.startswith("/elsewhere/log/gym-finetune/hopper-medium-v2_ppo_diffusion_mlp_ta4_td20_tdf10/")
    assert config.logdir.endswith("_42")


def test_started_elsewhere_the_repositorys_data_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("DPPO_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert app.prepare(hopper()).data_dir == str(REPOSITORY / "data")


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /gym/finetune/hopper-v2/ft_ppo_diffusion_mlp\n  - _self_\nseed: 7\n"
    )
    assert compose("mine", folder=tmp_path).seed == 7


# The resolver


@pytest.mark.parametrize(
    "expression, value",
    [
        ("11 * 2", 22),
        ("2 + 3 * 4 - 1", 13),
        ("7 / 2", 3.5),
        ("7 // 2", 3),
        ("7 % 4", 3),
        ("2 ** 10", 1024),
        ("-3 + +1", -2),
        ("round(2.6 * 2)", 5),
        ("int(7 / 2)", 3),
        ("max(1, min(5, 3))", 3),
        ("(1 + 2) * 3", 9),
    ],
)
def test_calc(expression, value):
    assert calc(expression) == value and type(calc(expression)) is type(value)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "open",
        "a + 1",
        "'a' * 3",
        "True",
        "(1).real",
        "[1, 2]",
        "print(1)",
        "2 if 1 else 3",
        "9 ** 9 ** 9",
        "10 ** 101",
        "1 / 0",
        "1 +",
        "",
        "round(1.5, ndigits=0)",
        "(lambda: 1)()",
        "1 << 3",
    ],
)
def test_calc_refuses(expression):
    with pytest.raises(ValueError):
        calc(expression)


# Objects from configurations


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "diffusion_rl.config.instantiate.ast.parse",
        "diffusion_rl.config.instantiate.importlib",
        "diffusion_rl.config.instantiate.calc",
        "diffusion_rl.config.compose.Path",
        "diffusion_rl.cli.app.compose",
        "diffusion_rl_evil.Model",
        "diffusion_rl",
        3,
    ],
)
def test_a_checkpoint_may_only_name_classes_of_this_package(target):
    inside = {"_target_": "diffusion_rl.policies.diffusion.DiffusionPolicy", "network": {"_target_": target}}
    for config in ({"_target_": target}, inside, {**inside, "network": [{"x": inside["network"]}]}):
        with pytest.raises(UserError, match="checkpoint's configuration"):
            instantiate_trusted(config, CHECKPOINT_CLASSES)


@pytest.mark.parametrize("extra", [{"_partial_": True}, {"_args_": [1]}, {"mlp_dims": "${oc.env:HOME}"}])
def test_a_checkpoint_may_not_give_directives(extra):
    with pytest.raises(UserError, match="refused"):
        instantiate_trusted(
            {"_target_": "diffusion_rl.networks.critics.CriticObs", "cond_dim": 2, **extra}, CHECKPOINT_CLASSES
        )


def test_a_saved_configuration_builds():
    saved = OmegaConf.to_container(app.prepare(hopper()).model)
    assert n_parameters(instantiate_trusted(saved, CHECKPOINT_CLASSES).critic) == 134913


def test_errors_from_inside_come_out_in_one_line():
    with pytest.raises(UserError, match="unknown activation 'Relu'"):
        instantiate(hopper("model.critic.activation_type=Relu").model)
    config = hopper()
    del config.model.critic.mlp_dims
    with pytest.raises(UserError, match="mlp_dims"):
        instantiate(config.model)


# Mistakes


@pytest.fixture(autouse=True)
def no_logging_set_up(monkeypatch):
    """Setting logging up anew closes the handlers there are, absl's with the stderr that pytest captures."""
    monkeypatch.setattr("hydra._internal.logging_config.configure_logging", lambda config: None, raising=False)
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)  # as other versions of Hydra do it


def run_app(capsys, monkeypatch, *arguments):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    status = app.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*HOPPER, "train.batchsize=3"], "did you mean train.batch_size"),
        ([*HOPPER, "batch_size=3"], "did you mean train.batch_size"),
        (
            [*HOPPER, "+train.batchsize=3"],
            "unknown configuration key 'train.batchsize': nothing reads it; did you mean",
        ),
        (
            [*HOPPER, "++env.n_env=3"],
            "unknown configuration key 'env.n_env': nothing reads it; did you mean env.n_envs",
        ),
        ([*HOPPER, "~train.gama"], "did you mean train.gamma"),
        (
            [*HOPPER, "use_ddim=true"],
            "'use_ddim' does nothing here: nothing of this configuration reads it; did you mean model.use_ddim?",
        ),
        ([*HOPPER, "+train.max_adv_weight=3"], "'train.max_adv_weight' does nothing here"),
        ([*HOPPER, "env.reward_shaping=true"], "'env.reward_shaping' does nothing here"),
        ([*HOPPER, "nope=1", "+neither=2"], "unknown configuration key"),
        ([*HOPPER, "model.use_ddim=maybe"], "model.use_ddim=maybe: not true or false"),
        ([*HOPPER, "train=3"], "'train' is a group of keys"),
        ([*HOPPER, "env=hopper-medium-v2"], "'env' is a group of keys"),
        ([*HOPPER, "train.batch_size=abc"], "train.batch_size=abc: not a whole number"),
        ([*HOPPER, "train.gamma=high"], "train.gamma=high: not a number"),
        ([*HOPPER, "env.save_video=1"], "env.save_video=1: not true or false"),
        ([*HOPPER, "obs_dim=???"], "obs_dim has no value"),
        ([*HOPPER, "obs_dim=${nope}"], "'nope' not found"),
        ([*HOPPER, "obs_dim=${eval:open}"], "'open' is not arithmetic"),
        ([*HOPPER, "obs_dim=${calc:open}"], "'open' is not arithmetic"),
        ([*HOPPER, "seed=[1"], "cannot read the argument seed=[1: no viable alternative at input '[1'"),
        ([*HOPPER, "--sed=1"], "unrecognized arguments: --sed=1"),
        ([*HOPPER, "model.critic._target_=model.common.Nobody"], "one of the reference's without a counterpart here"),
        ([*HOPPER, "model.critic._target_=diffusion_rl.data.sequences.SequenceDataset"], "is no network"),
        ([*HOPPER, "model.critic._target_=nobody.Critic"], "model.critic._target_: cannot import 'nobody.Critic'"),
        ([*HOPPER, "model.critic._target_=os.getcwd"], "'os.getcwd' is of Python's standard library"),
        ([*HOPPER, "+model.clip_plos=1"], "did you mean model.clip_ploss_coef"),
        ([*HOPPER, "+model.actor.mlp_dim=[3]"], "did you mean model.actor.mlp_dims"),
        ([*HOPPER, "device=gpux"], "device=gpux is neither cpu nor cuda:<number>"),
        (["--config-dir=cfg/gym/finetune/hoper-v2", HOPPER[1]], "did you mean cfg/gym/finetune/hopper-v2"),
        ([HOPPER[0], "--config-name=ft_ppo_difusion_mlp"], "did you mean ft_ppo_diffusion_mlp"),
        ([HOPPER[1]], "add --config-dir=cfg/gym/finetune/"),
        ([HOPPER[0]], "no --config-name given"),
    ],
)
def test_a_mistake_gets_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("DPPO_LOG_DIR", str(tmp_path))
    status, out, err = run_app(capsys, monkeypatch, *arguments)
    assert status == 2 and message in err
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_no_arguments_help_and_help_on_a_configuration(capsys, monkeypatch):
    status, out, err = run_app(capsys, monkeypatch)
    assert status == 2 and err.startswith("usage: python script/run.py") and err.count("\n") == 1
    status, out, err = run_app(capsys, monkeypatch, "--help")
    (hopper,) = [line for line in out.splitlines() if "cfg/gym/finetune/hopper-v2: " in line]
    assert status == 0 and "ft_ppo_diffusion_mlp" in hopper
    status, out, err = run_app(capsys, monkeypatch, "--help", *HOPPER)
    assert status == 0 and "train.batch_size" in out and "50000" in out and KEYS["train.batch_size"] in out


class Loop:
    """Stands for a loop of somebody's own package."""

    result: list = []
    error: BaseException | None = None

    def __init__(self, config):
        self.config = config

    def run(self):
        if Loop.error is not None:
            raise Loop.error
        Loop.result.append(self.config)


@pytest.fixture
def own_loop(monkeypatch):
    monkeypatch.setattr(Loop, "result", [])
    monkeypatch.setattr(Loop, "error", None)
    monkeypatch.setitem(sys.modules, "own_package", sys.modules[__name__])
    return Loop


def test_a_loop_of_ones_own_may_be_named_on_the_command_line(capsys, monkeypatch, own_loop, tmp_path):
    status, _, err = run_app(
        capsys, monkeypatch, *HOPPER, "_target_=own_package.Loop", "+whatever=1", "wandb.entity=me"
    )
    assert status == 0, err
    (config,) = own_loop.result
    assert config.whatever == 1
    assert config.wandb.entity == "me" and config.wandb.project == "gym-hopper-medium-v2-finetune"


def test_multirun(capsys, monkeypatch, own_loop, tmp_path):
    monkeypatch.setenv("DPPO_LOG_DIR", str(tmp_path))
    status, _, err = run_app(capsys, monkeypatch, *HOPPER, "_target_=own_package.Loop", "-m", "seed=1,2")
    assert status == 0, err
    assert [config.seed for config in own_loop.result] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["multirun"]


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("the data\nis gone"), 2, "error: the data is gone\n"),
        (FileNotFoundError(2, "No such file or directory", "x.npz"), 2, "error: x.npz: No such file or directory\n"),
        (OSError(28, "No space left on device", "log"), 2, "error: log: No space left on device\n"),
        (Interrupted("stopped; state saved"), 130, "stopped; state saved\n"),
        (KeyboardInterrupt(), 130, "interrupted; resume=auto goes on from the last checkpoint\n"),
    ],
)
def test_exit_statuses(capsys, monkeypatch, own_loop, error, status, line):
    own_loop.error = error
    assert run_app(capsys, monkeypatch, *HOPPER, "_target_=own_package.Loop") == (status, "", line)


def test_tracebacks_on_request(monkeypatch, own_loop):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    own_loop.error = UserError("x")
    with pytest.raises(UserError):
        app.main([*HOPPER, "_target_=own_package.Loop"])
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_check_keys_knows_environments_of_ones_own():
    config = OmegaConf.to_container(hopper("+env.specific.anything=1"), resolve=True)
    check_keys(config, {})
    config["env"] |= {"_target_": "own_package.Env", "whatever": 1}
    check_keys(config, {})
    config["env"]["_target_"] = "diffusion_rl.envs.Env"
    config["env"]["wrappers"]["multi_step"]["n_acton_steps"] = 3
    del config["env"]["_target_"], config["env"]["whatever"]
    with pytest.raises(UserError, match="did you mean env.wrappers.multi_step.n_action_steps"):
        check_keys(config, {})


# The real thing: python script/run.py


def script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "script/run.py", *arguments],
        cwd=REPOSITORY,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_script_unknown_key(tmp_path):
    done = script(*HOPPER, "train.batchsize=3", DPPO_LOG_DIR=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: unknown configuration key 'train.batchsize'")
    assert done.stderr.count("\n") == 1 and not done.stdout and not list(tmp_path.iterdir())


def test_script_missing_file(tmp_path):
    done = script(*HOPPER, "base_policy_path=nowhere.safetensors", DPPO_LOG_DIR=str(tmp_path))
    assert done.returncode == 2 and "nowhere.safetensors" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_script_wrong_obs_dim(tmp_path):
    scratch = ["--config-dir=cfg/gym/scratch/hopper-v2", "--config-name=ppo_diffusion_mlp"]
    done = script(*scratch, "obs_dim=12", DPPO_LOG_DIR=str(tmp_path))
    assert done.returncode == 2 and "obs_dim=12" in done.stderr and "11" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_the_script_is_thin():
    assert len((Path(REPOSITORY) / "script/run.py").read_text().splitlines()) <= 60


# Spellings


@pytest.mark.parametrize(
    "path", ["a=1/b=0.97.pt", "a, b/c.pt", "it's/x.pt", "(1)/x [2].pt", "a b/c.pt", "plain/x.pt", "C:\\x.pt"]
)
@pytest.mark.parametrize("multirun", [False, True])
def test_a_path_may_have_any_letters(path, multirun):
    quoted = command_line._quoted(f"base_policy_path={path}", multirun)
    if multirun and "," in path:
        return  # there, commas part the values of a sweep
    assert hopper(quoted).base_policy_path == path


def test_optional_keys_and_arguments_need_no_plus():
    defaults = flatten(OmegaConf.to_container(app.prepare(hopper())))

    def added(override):
        return command_line._added(override, defaults)

    assert added("model.use_ddim=true") == "++model.use_ddim=true"
    assert added("model.eta._target_=x.Y") == "++model.eta._target_=x.Y"
    assert added("train.max_grad_norm=1") == "++train.max_grad_norm=1"
    assert added("+seed=3") == "++seed=3" and added("seed=3") == "seed=3"
    assert added("nope=1") == "nope=1" and added("~train.gamma") == "~train.gamma"


def test_too_little_memory_is_one_line():
    class ResourceExhaustedError(Exception):  # TensorFlow's is known by its name
        pass

    for error in (MemoryError("Unable to allocate 3 PiB"), ResourceExhaustedError("OOM when\nallocating")):
        line = line_for_user(error, app.SMALLER)
        assert line and line.startswith("not enough memory (") and "train.batch_size" in line and "\n" not in line


FINE_TUNE = "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"


@pytest.mark.parametrize(("own", "name"), [([], "MyEnv-v0"), (["env_name=mine"], "mine")])
def test_a_run_in_an_environment_of_ones_own_is_named_after_it(own, name):
    usual = flatten(plain_copy(compose_job(FINE_TUNE)))
    config = app.prepare(compose_job(FINE_TUNE, ["env.name=my_package:MyEnv-v0", "obs_dim=7", *own]), usual)
    assert config.env_name == name and config.name.startswith(f"{name}_ppo_") and f"/{name}_ppo_" in config.logdir
    chosen = "logdir=runs/hopper-medium-v2/mine"
    config = app.prepare(compose_job(FINE_TUNE, ["env.name=my_package:MyEnv-v0", "obs_dim=7", chosen, *own]), usual)
    assert config.logdir == "runs/hopper-medium-v2/mine"


@pytest.mark.parametrize(
    ("config", "overrides", "evaluation"),
    [
        (FINE_TUNE, [], ["eval_diffusion_mlp", "gym/eval/hopper-v2"]),
        (FINE_TUNE, ["act_steps=2"], ["eval_diffusion_mlp", "gym/eval/hopper-v2", "act_steps=2"]),
        ("d3il/pretrain/avoid_m2/pre_gmm_mlp", [], ["eval_gmm_mlp", "d3il/eval/avoid_m2"]),
        (FINE_TUNE, ["model.actor.mlp_dims=[8,8,8]"], []),
    ],
)
def test_a_run_knows_the_command_that_evaluates_it(config, overrides, evaluation, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    settings = plain_copy(app.prepare(compose_job(config, overrides)))
    words = evaluation_of(settings, Path("log/x")).split()
    if not evaluation:
        assert not words
        return
    name, folder, *own = evaluation
    asked = [f"--config-name={name}", f"--config-dir=cfg/{folder}", "base_policy_path=log/x"]
    assert words == ["python", "script/run.py", *asked, *own]


def test_one_variable_moves_what_all_programs_write(monkeypatch, tmp_path):
    monkeypatch.setenv("DPPO_LOG_DIR", str(tmp_path))
    assert app.prepare(compose_job(FINE_TUNE)).logdir.startswith(str(tmp_path))
    assert diffuser.parse_command("train", []).logbase == str(tmp_path / "logs")
    assert diffuser.parse_command("train", ["--logbase", "here"]).logbase == "here"
    assert diffuser_lite.parse("mujoco", []).results_dir == str(tmp_path / "results")
    assert vae_latent.settings({"env_type": "toy", "dataset": "toy"})["logbase"] == str(tmp_path / "logs")


def test_a_run_that_fails_before_its_first_row_leaves_nothing(tmp_path):
    folder = tmp_path / "name" / "date"
    with pytest.raises(ValueError), RunDir(folder, {"seed": 1}, StateFiles("a kind", {})) as run_dir:
        run_dir.begin()
        assert (folder / "config.yaml").is_file()
        raise ValueError
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError), RunDir(folder, {"seed": 1}, StateFiles("a kind", {})) as run_dir:
        run_dir.begin()
        run_dir.log({"itr": 0, "kind": "train", "loss": 1.0})
        raise ValueError
    assert (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()
