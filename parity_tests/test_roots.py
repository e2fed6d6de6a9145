"""The recorder's float32 square roots are found whatever this machine's torch gives (`replay.roots`)."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_rl.diffusion.schedules import ddpm_schedule
from parity_tests.replay import roots as module
from parity_tests.replay.build import roots_of_alphas, schedule_tables
from parity_tests.replay.files import GOLDENS
from parity_tests.replay.roots import NEVER_MISSED, Roots, neighbours, settled

one = np.float32(1)


def missing_root(x: np.ndarray) -> np.ndarray:
    """A square root that misses the nearest number where it may, for every other number."""
    nearest, second = neighbours(x)
    beyond = np.abs(np.sqrt(x.astype(np.float64)) - nearest) > NEVER_MISSED * np.spacing(nearest)
    return np.where(beyond & (x.view(np.uint32) % 2 == 0), second, nearest)


def tables_with(root, steps: int) -> dict[str, np.ndarray]:
    """A schedule as a processor with this square root records it."""
    own = ddpm_schedule(steps)
    abar, before = own.alphas_cumprod, own.alphas_cumprod_prev
    return {
        "alphas": own.alphas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": root(abar),
        "sqrt_one_minus_alphas_cumprod": root(one - abar),
        "sqrt_recip_alphas_cumprod": root(one / abar),
        "sqrt_recipm1_alphas_cumprod": root(one / abar - one),
        "ddpm_mu_coef2": (one - before) * root(own.alphas) / (one - abar),
    }


@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize("torch_is_recorders", [True, False])
def test_roots_of_another_processor_are_found(steps, torch_is_recorders, monkeypatch):
    monkeypatch.setattr(module, "_torch_root", missing_root if torch_is_recorders else np.sqrt)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    tables = tables_with(missing_root, steps)
    true, roots = missing_root(tables["alphas"]), Roots()
    roots.read(tables)
    found = roots_of_alphas(tables, tables["alphas"], roots, used=True)
    assert set(tables["alphas"][found != true].tolist()) <= set(roots.open)
    assert not (torch_is_recorders and roots.open)

    def outputs(chosen: Roots) -> dict[str, np.ndarray]:
        """Values that depend on every root."""
        chosen.read(tables)
        root = roots_of_alphas(tables, tables["alphas"], chosen, used=True).astype(np.float64)
        return {"actions": np.cumprod(root) * np.arange(1, steps + 1)}

    recorded = {"actions": np.cumprod(true.astype(np.float64)) * np.arange(1, steps + 1)}
    chosen = settled(roots, outputs(roots), outputs, recorded)
    np.testing.assert_allclose(outputs(chosen)["actions"], recorded["actions"], rtol=1e-13)
    assert not roots.missed, "settled makes new roots"


def test_recorded_roots_are_never_missed_within_a_quarter_of_a_unit():
    """What `Roots` rests on, of every root that the shipped recordings hold."""
    tables, pairs = schedule_tables(GOLDENS), {}
    for key in {name.split("/")[0] for name in tables}:
        pairs |= module._recorded_pairs({k.split("/")[1]: v for k, v in tables.items() if k.startswith(key + "/")})
    x, root = (np.array(list(values), np.float32) for values in (pairs, pairs.values()))
    nearest, second = neighbours(x)
    missed = root != nearest
    distance = np.abs(np.sqrt(x.astype(np.float64)) - nearest) / np.spacing(nearest)
    assert len(x) == 500 and missed.sum() == 91
    np.testing.assert_array_equal(root[missed], second[missed])
    assert distance[missed].min() > NEVER_MISSED
