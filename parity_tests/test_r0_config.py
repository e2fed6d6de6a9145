"""Rung 0: every resolved value of every shipped configuration equals the reference's, or is a listed difference."""

import copy

import pytest
from omegaconf import OmegaConf

from diffusion_rl.cli.app import prepare
from diffusion_rl.config.compose import shipped_configs
from diffusion_rl.config.instantiate import flatten
from parity_tests import r0_config

GOLDEN = r0_config.reference_values()


@pytest.fixture(scope="module")
def composed():
    """Each configuration, unresolved, and the folder of its runs."""
    return {config: r0_config.composed(config) for config in shipped_configs()}


@pytest.fixture(scope="module")
def compared(composed):
    """(unlisted differences of each configuration, the table with what was found)."""
    rows = r0_config.differences()
    lines = {
        name: list(r0_config.compare(name, r0_config.resolved_values(config), GOLDEN.get(name, {}), rows))
        for name, config in composed.items()
    }
    return lines, rows


@pytest.mark.parametrize("config", shipped_configs())
def test_values_equal_the_references(config, compared):
    assert not compared[0][config], "\n".join(compared[0][config])


def test_every_recorded_configuration_is_shipped():
    assert sorted(GOLDEN) == shipped_configs()


@pytest.mark.parametrize("row", range(len(r0_config.differences())))
def test_every_listed_difference_still_occurs(row, compared):
    line = compared[1][row]
    assert not line.stale(), f"no longer different: {line.stale()} ({line.why})"


def test_the_table_is_up_to_date(compared):
    assert r0_config.TABLE.read_text() == r0_config.table(compared[1]), "run python -m parity_tests.r0_config"


def test_an_unlisted_difference_is_reported():
    config = "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"
    wrong = r0_config.our_values(config, ["train.gamma=0.999"])
    lines = list(r0_config.compare(config, wrong, GOLDEN[config], r0_config.differences()))
    assert lines == [f"{config}: train.gamma is 0.999, in the reference 0.99"]


def test_a_line_without_a_difference_is_reported():
    row = r0_config.Difference(keys=["seed"], ours=42, reference=7, why="")
    values = {"seed": 42}
    assert list(r0_config.compare("any", values, values, [row])) == [] and row.stale() == ["seed", "*"]


@pytest.mark.parametrize("config", [name for name in shipped_configs() if "wandb.project" in GOLDEN.get(name, {})])
def test_wandb_values_when_it_is_on(config, composed):
    cfg = copy.deepcopy(composed[config][0])
    OmegaConf.update(cfg, "wandb.mode", "online", force_add=True)
    with r0_config.conditions():
        values = flatten(OmegaConf.to_container(prepare(cfg)))
    ours = {key: r0_config.undated(value) for key, value in values.items()}
    theirs = {key: value for key, value in GOLDEN[config].items() if key.startswith("wandb.")}
    for key in ("name", "env_name"):  # where these differ, which the differences list, wandb's names differ with them
        named, meant = GOLDEN[config].get(key, ""), ours[key]
        theirs = {k: value.replace(named, meant) if named else value for k, value in theirs.items()}
    assert {key: ours[key] for key in theirs} == theirs
