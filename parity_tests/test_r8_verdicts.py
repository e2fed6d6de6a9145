"""Rung 8: the verdicts on the committed learning curves, computed again; the statistics on drawn numbers."""

import numpy as np
import pytest
from scipy import stats

from parity_tests import r8_curves, r8_planners

CASES = r8_curves.protocol()
PLANNED = r8_planners.read_returns()
RUN = [name for name in CASES if (r8_curves.RUNS / f"{name}.csv").exists()]


def drawn(seed, shift, seeds=10, spread=1.0):
    return shift + spread * np.random.default_rng(seed).standard_normal(seeds)


def test_equal_samples_are_equivalent_within_a_wide_margin_and_open_within_a_narrow_one():
    theirs, ours = drawn(0, 100.0), drawn(1, 100.0)
    assert r8_curves.equivalence(theirs, ours, 5.0).word == "equivalent"
    assert r8_curves.equivalence(theirs, ours, 0.05).word == "open"


@pytest.mark.parametrize("shift", [-20.0, 20.0])
def test_a_shift_beyond_the_margin_is_a_difference(shift):
    assert r8_curves.equivalence(drawn(0, 100.0), drawn(1, 100.0 + shift), 5.0).word == "different"


def test_the_interval_is_welchs():
    theirs, ours = drawn(0, 100.0, 10, 3.0), drawn(1, 102.0, 7, 1.0)
    verdict = r8_curves.equivalence(theirs, ours, 5.0)
    a, b = ours.var(ddof=1) / 7, theirs.var(ddof=1) / 10
    degrees = (a + b) ** 2 / (a**2 / 6 + b**2 / 9)
    reach = stats.t.ppf(0.95, degrees) * np.sqrt(a + b)
    difference = ours.mean() - theirs.mean()
    np.testing.assert_allclose([verdict.low, verdict.high], [difference - reach, difference + reach], rtol=1e-12)


def test_false_equivalence_is_as_rare_as_the_test_promises():
    """Two samples whose means differ by the margin itself are called equivalent in 5 of 100 draws, not more often."""
    words = [r8_curves.equivalence(drawn(2 * i, 0.0), drawn(2 * i + 1, 1.5), 1.5).word for i in range(2000)]
    assert 0.03 < np.mean([word == "equivalent" for word in words]) < 0.07


@pytest.mark.parametrize("name", RUN)
def test_committed_curves_are_equivalent(name):
    """The verdict from the files: whole runs, and once the seeds that the protocol asks for are there, every window
    equivalent."""
    case, curves = CASES[name], r8_curves.read_curves(name, CASES[name])
    assert {len(run) for runs in curves.values() for run in runs.values()} == {case.iterations}
    if awaited := r8_curves.missing(case, curves):
        pytest.skip(f"{case.title}: {len(awaited)} of {2 * case.seeds} runs are to come")
    words = {window: verdict.word for window, verdict in r8_curves.verdicts(case, curves).items()}
    assert words == dict.fromkeys(r8_curves.WINDOWS, "equivalent")


@pytest.mark.skipif(not RUN, reason="no case has been run yet")
def test_the_table_is_of_the_committed_curves():
    assert r8_curves.table({name: CASES[name] for name in RUN}) in r8_curves.TABLE.read_text()


@pytest.mark.parametrize("name", PLANNED)
def test_committed_plans_are_equivalent(name):
    case, sides = r8_planners.protocol()[name], PLANNED[name]
    assert {len(values) for values in sides.values()} == {case["episodes"]} and case["episodes"] >= 50
    assert r8_planners.verdict(case, sides).word == "equivalent"


@pytest.mark.skipif(not PLANNED, reason="no planner has been played yet")
def test_the_table_is_of_the_committed_plans():
    assert r8_planners.table(r8_planners.protocol(), PLANNED) in r8_planners.VERDICTS.read_text()
