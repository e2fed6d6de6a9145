"""The planners' command lines: options, deferred texts, names of folders, and what is refused."""

import pytest

from diffusion_rl.core.errors import UserError
from diffusion_rl.methods.diffuser.options import expand, experiment_name, parse


def options(experiment, *arguments, config="config.locomotion"):
    return parse(experiment, arguments, "hopper-medium-expert-v2", config, save=False)


def test_the_order_of_values():
    assert options("plan").scale == 0.0001  # the data set's
    assert options("plan", "--dataset", "walker2d-medium-v2").scale == 0.1  # the experiment's
    assert options("plan", "--scale", "1e-3").scale == 1e-3  # the command line's


def test_presets():
    given = options("diffusion", "--preset", "paper_v1", "--learning_rate", "1e-3")
    assert (given.n_diffusion_steps, given.n_train_steps, given.learning_rate) == (100, 500e3, 1e-3)
    assert options("plan", "--preset", "paper_v1").diffusion_loadpath == "diffusion/defaults_H32_T100"
    with pytest.raises(UserError, match="has paper_v1"):
        options("plan", "--preset", "paper_v9")
    with pytest.raises(UserError, match="has none"):
        options("plan", "--preset", "paper_v1", config="config.maze2d")


def test_a_data_set_changes_a_preset():
    cheetah = ("--preset", "laptop", "--dataset", "halfcheetah-medium-expert-v2")
    given = options("diffusion", *cheetah)
    assert (given.horizon, given.dim_mults, given.n_diffusion_steps) == (4, (1, 4, 8), 10)  # the data set's wins
    assert (given.n_train_steps, options("diffusion", "--preset", "laptop").n_train_steps) == (90e3, 28e3)
    given = options("plan", *cheetah)
    assert (given.scale, given.t_stopgrad) == (100, 2)  # what it changes in the preset, not what it changes otherwise
    assert given.value_loadpath == f"values/defaults_H4_T10_d{options('values', *cheetah).discount}"
    assert options("plan", *cheetah, "--scale", "0.5").scale == 0.5


def test_deferred_texts_see_the_final_values():
    given = options("plan", "---horizon", "16", "--value_loadpath", "f:values/mine_H{horizon}_d{discount}")
    assert given.value_loadpath == "values/mine_H16_d0.997"
    assert given.diffusion_loadpath == "diffusion/defaults_H16_T20"


@pytest.mark.parametrize("template", ["f:{nothing}", "f:{horizon.__class__}", "f:{horizon[0]}", "f:{0}", "f:{"])
def test_deferred_texts_hold_names_only(template):
    with pytest.raises(UserError):
        expand(template, {"horizon": 32})


def test_types():
    given = options("diffusion", "--dim_mults", "(1,4,8)", "--attention", "True", "--n_train_steps", "1000")
    assert (given.dim_mults, given.attention, given.n_train_steps) == ((1, 4, 8), True, 1000.0)
    assert options("diffusion", "--loss_discount", "0.9").loss_discount == 0.9
    assert options("diffusion", "--seed", "5").seed == 5
    assert options("diffusion", "--bucket", "gs://bucket/x").bucket == "gs://bucket/x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--horizn", "16"], "did you mean --horizon"),
        (["--horizon"], "has no value"),
        (["--horizon", "abc"], "whole number"),
        (["--n_saves", "5.5"], "whole number"),
        (["--learning_rate", "high"], "a number is needed"),
        (["--predict_epsilon", "yes"], "True or False"),
        (["--dim_mults", "__import__('os')"], "write"),
        (["--config", "config.nothing"], "there are config.kuka, config.locomotion, config.maze2d"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        options("diffusion", *arguments)


def test_names_of_experiments():
    watch = [["prefix", ""], ["horizon", "H"], ["nothing", "n"], ["weights", "w"]]
    values = {"prefix": "plans/", "horizon": 32, "weights": (1, 2)}
    assert experiment_name(watch, values) == "plans/H32_w1-2"


def test_models_of_actions_have_folders_of_their_own():
    assert options("diffusion", "--diffusion_type", "actions_only").exp_name == "diffusion/actions_H32_T20"
    assert options("diffusion", "--diffusion_type", "actions_only", "--prefix", "mine").exp_name == "mine_H32_T20"


def test_a_configuration_from_before_resuming_can_be_resumed(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "diffusion:\n  watch: [[prefix, '']]\n  options: {logbase: logs, prefix: mine, n_train_steps: 100}\n"
        "plan:\n  watch: [[prefix, '']]\n  options: {logbase: logs, prefix: plans}\n"
    )
    assert options("diffusion", config=str(own)).stop_at is None
    given = options("diffusion", "--stop_at", "10", "--resume", "True", config=str(own))
    assert (given.stop_at, given.resume) == (10, "True")
    with pytest.raises(UserError, match="stop_at"):
        options("plan", "--stop_at", "10", config=str(own))
