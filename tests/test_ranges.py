"""Numbers of configurations: what is in their ranges, and the one line about what is not."""

import math

import pytest

from diffusion_rl.config.overrides import PYTHON, YAML, value_of
from diffusion_rl.config.schema import (
    DEVICE,
    FILE,
    FLAG,
    FLAGS,
    HYDRA,
    LIST,
    PAIRS,
    SEED,
    TEXT_OR_NONE,
    Relation,
    at_most,
    check_kind,
    check_ranges,
    kind_like,
    multiple,
    number,
    one_of,
    positive,
    step_or,
    unknown_option,
    whole,
)
from diffusion_rl.core.errors import UserError


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (whole(1), [1, 2.0, 10**9], [0, -1, 1.5, math.inf, math.nan, True, "1", None, [1], 10**400]),
        (positive(), [1e-9, 1], [0, -1e-9, math.inf, -math.inf, math.nan, False, "x"]),
        (number(0, 1, null=True), [0, 1, 0.5, None], [1.01, -0.01, math.nan]),
        (whole(1, 8, many=True), [[1], (1, 8)], [[], [0], [9], 3, [[1]], ["a"], None]),
        (SEED, [0, 2**63 - 1], [-1, 2**63, 0.5]),
        (one_of("l1", "l2"), ["l1", "l2"], ["l3", "", None, 1, ["l1"]]),
        (step_or("latest"), ["latest", 0, 200], ["newest", -1, 1.5, None, True]),
        (DEVICE, ["cpu", "cuda", "cuda:3", None], ["tpu", "cuda:x", "cuda:", 0]),
        (FLAG, [True, False], [1, 0, "true", None]),
        (TEXT_OR_NONE, ["", "x", None], [1, ["x"]]),
        (kind_like(3), [4, 5.0], [1.5, "x", None, True]),
        (kind_like(3.0), [4, 5.5], ["x", None, True]),
        (kind_like((1, 2)), [(1,), ()], [[1], 1]),
        (kind_like(None), [1, "x", None, [1]], []),
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


@pytest.mark.parametrize(
    ("spelling", "line"),
    [
        (FLAGS, "--n abc: a whole number is needed here (write it like 4)"),
        (PAIRS, "n=abc: a whole number is needed here"),
        (HYDRA, "n=abc: not a whole number (such as 4)"),
        (FILE, "n: 'abc' is no whole number"),
    ],
)
def test_every_program_spells_it_in_its_own_way(spelling, line):
    with pytest.raises(UserError) as raised:
        check_kind("n", "abc", whole(), spelling, 4)
    assert str(raised.value) == line


@pytest.mark.parametrize(
    ("text", "kind", "default", "python", "yaml"),
    [
        ("4", whole(), 1, 4, 4),
        ("4", number(), 1.0, 4.0, 4.0),
        ("1e3", number(), 1.0, 1000.0, 1000.0),
        ("1e3", whole(), 1.0, 1000.0, 1000.0),
        ("x", one_of("x", "y"), "y", "x", "x"),
        ("7", step_or("latest"), "latest", 7, 7),
        ("latest", step_or("latest"), "latest", "latest", "latest"),
    ],
)
def test_texts_become_values_of_the_defaults_type(text, kind, default, python, yaml):
    found = [value_of("n", text, kind, default, syntax) for syntax in (PYTHON, YAML)]
    assert found == [python, yaml] and [type(value) for value in found] == [type(python), type(yaml)]


def test_each_command_line_has_its_own_words():
    assert value_of("a", "None", TEXT_OR_NONE, "x", PYTHON) is None is value_of("a", "null", TEXT_OR_NONE, "x", YAML)
    assert value_of("a", "None", TEXT_OR_NONE, "x", YAML) == "None"
    assert [value_of("a", text, FLAG, True, PYTHON) for text in ("True", "1", "False", "0")] == [
        True,
        True,
        False,
        False,
    ]
    assert value_of("a", "true", FLAG, False, YAML) is True
    assert value_of("a", "(1, 2)", whole(many=True), (4,), PYTHON) == (1, 2)
    assert value_of("a", "3", whole(many=True), (4,), PYTHON) == (3,)
    assert value_of("a", "['x']", LIST, [], PYTHON) == ["x"]


def test_an_unknown_option_names_the_nearest_or_where_all_are():
    known = ("batch_size", "horizon")
    assert str(unknown_option("horizn", known, "it", FLAGS)) == "--horizn is no option of it; did you mean --horizon?"
    assert str(unknown_option("zzz", known, "it", PAIRS)) == "zzz is no option of it; --help lists them all"
