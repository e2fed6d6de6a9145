"""Rung 0: every resolved value of every shipped configuration equals the reference's, or is a listed difference."""

import os
import pickle
import re

import pytest
from omegaconf import OmegaConf

from diffusion_rl.cli.app import prepare
from diffusion_rl.config.instantiate import flatten
from parity_tests import r0_config
from parity_tests.r0_config import compared_configs

GOLDEN = r0_config.reference_values()


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Return a function of a configuration: what `r0_config.composed` gives or its values, made once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "composed"
    folder.mkdir(exist_ok=True)

    def get(config, what):
        path = folder / re.sub(r"\W", "_", config)
        if not path.with_suffix(".values").exists():
            made = r0_config.composed(config)
            for suffix, content in ((".cfg", made[0]), (".values", r0_config.resolved_values(made))):
                part = path.with_suffix(f"{suffix}{os.getpid()}")
                part.write_bytes(pickle.dumps(content))
                part.replace(path.with_suffix(suffix))
        return pickle.loads(path.with_suffix(what).read_bytes())

    return get


def unlisted(config, composed, rows):
    """List the differences of a configuration that no row explains; note the others in the rows."""
    return list(r0_config.compare(config, composed(config, ".values"), GOLDEN.get(config, {}), rows))


@pytest.fixture(scope="module")
def found(composed):
    """The table of differences with what was found in all configurations."""
    rows = r0_config.differences()
    for name in reversed(compared_configs()):  # another process may be going through them from the front
        unlisted(name, composed, rows)
    return rows


@pytest.mark.parametrize("config", compared_configs())
def test_values_equal_the_references(config, composed):
    assert not (lines := unlisted(config, composed, r0_config.differences())), "\n".join(lines)


def test_every_recorded_configuration_is_shipped():
    assert sorted(GOLDEN) == compared_configs()


@pytest.mark.parametrize("row", range(len(r0_config.differences())))
def test_every_listed_difference_still_occurs(row, found):
    line = found[row]
    assert not line.stale(), f"no longer different: {line.stale()} ({line.why})"


def test_the_table_is_up_to_date(found):
    assert r0_config.TABLE.read_text() == r0_config.table(found), "run python -m parity_tests.r0_config"


def test_an_unlisted_difference_is_reported():
    config = "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"
    wrong = r0_config.our_values(config, ["train.gamma=0.999"])
    lines = list(r0_config.compare(config, wrong, GOLDEN[config], r0_config.differences()))
    assert lines == [f"{config}: train.gamma is 0.999, in the reference 0.99"]


def test_a_line_without_a_difference_is_reported():
    row = r0_config.Difference(keys=["seed"], ours=42, reference=7, why="")
    values = {"seed": 42}
    assert list(r0_config.compare("any", values, values, [row])) == [] and row.stale() == ["seed", "*"]


@pytest.mark.parametrize("config", [name for name in compared_configs() if "wandb.project" in GOLDEN.get(name, {})])
def test_wandb_values_when_it_is_on(config, composed):
    cfg = composed(config, ".cfg")
    OmegaConf.update(cfg, "wandb.mode", "online", force_add=True)
    with r0_config.conditions():
        values = flatten(OmegaConf.to_container(prepare(cfg)))
    ours = {key: r0_config.undated(value) for key, value in values.items()}
    theirs = {key: value for key, value in GOLDEN[config].items() if key.startswith("wandb.")}
    for key in ("name", "env_name"):  # where these differ, which the differences list, wandb's names differ with them
        named, meant = GOLDEN[config].get(key, ""), ours[key]
        theirs = {k: value.replace(named, meant) if named else value for k, value in theirs.items()}
    assert {key: ours[key] for key in theirs} == theirs
