"""Numbers of configurations: what is in their ranges, and the one line about what is not."""

import math

import pytest

from diffusion_rl.config.schema import SEED, Relation, at_most, check_ranges, multiple, number, positive, whole
from diffusion_rl.core.errors import UserError


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (whole(1), [1, 2.0, 10**9], [0, -1, 1.5, math.inf, math.nan, True, "1", None, [1], 10**400]),
        (positive(), [1e-9, 1], [0, -1e-9, math.inf, -math.inf, math.nan, False, "x"]),
        (number(0, 1, null=True), [0, 1, 0.5, None], [1.01, -0.01, math.nan]),
        (whole(1, 8, many=True), [[1], (1, 8)], [[], [0], [9], 3, [[1]], ["a"], None]),
        (SEED, [0, 2**63 - 1], [-1, 2**63, 0.5]),
    ],
)
def test_what_is_in_a_range(allowed, inside, outside):
    assert all(allowed.holds(value) for value in inside)
    assert not any(allowed.holds(value) for value in outside)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"n": 0}, "--n 0: a whole number from 1 to 9 is needed here"),
        ({"rate": -1}, "--rate -1: a number above 0 is needed here"),
        ({"rate": math.nan}, "--rate nan: a number above 0 is needed here"),
        ({"n": 10**5000}, "--n (a number of thousands of digits): a whole number from 1 to 9 is needed here"),
        ({"n": 5, "most": 4}, "--n 5, --most 4: n must be at most most"),
        ({"every": 3, "n": 2}, "--every 3, --n 2: every must be a multiple of n"),
    ],
)
def test_what_is_wrong_is_one_line(values, line):
    ranges = {"n": whole(1, 9), "rate": positive()}
    with pytest.raises(UserError) as raised:
        check_ranges(values, ranges, "--{} {}".format, (at_most("n", "most"), multiple("every", "n")))
    assert str(raised.value) == line


def test_what_is_right_or_missing_passes():
    odd = Relation(("n", "other"), lambda n, other: False, "never")
    check_ranges({"n": 4, "every": 0, "other": None}, {"n": whole(1), "gone": positive()}, relations=(odd,))
