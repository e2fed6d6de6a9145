"""YAML of people: what it may be, and the one line about everything else."""

import os

import pytest

from diffusion_rl.config.yaml_files import MOST_VALUES, parse_yaml, read_yaml
from diffusion_rl.core.errors import UserError

NINES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{" + ", ".join(f"k{j}: *a{i - 1}" for j in range(9)) + "}\n" for i in range(1, 12)
)
MERGED_NINES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [" + ", ".join([f"*a{i - 1}"] * 9) + "]}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: [1e-4, 1E3, -2e+1, 7, 0x10, 1.5]", {"a": [1e-4, 1e3, -20.0, 7, 16, 1.5]}),
        ("one: &b {x: 1}\ntwo: {<<: *b, y: 2}", {"one": {"x": 1}, "two": {"x": 1, "y": 2}}),
        (
            "x: &b {x: 1}\ny: &c {<<: *b, x: 2}\nz: {<<: [*c, *b], q: 1}",
            {"x": {"x": 1}, "y": {"x": 2}, "z": {"x": 2, "q": 1}},
        ),
        ("a: &l [1, 2]\nb: *l", {"a": [1, 2], "b": [1, 2]}),
        ("a: 2001-99-99\nb: 2001-01-01", {"a": "2001-99-99", "b": "2001-01-01"}),
        ("a: =", {"a": "="}),
        ("", None),
    ],
)
def test_what_is_read(text, value):
    assert parse_yaml(text, "x") == value


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: !!int abc", "a value is not what its tag says"),
        ("a: !!bool x", "a value is not what its tag says"),
        ("a: !!float x", "a value is not what its tag says"),
        ("a: !!timestamp abc", "'timestamp' is no type"),
        ("a: !!set {a, b}", "'set' is no type"),
        ("a: !!binary eA==", "'binary' is no type"),
        ("a: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("a: " + "9" * 5000, "line 1: a number may have 1000 digits"),
        ("a: 1" + ":59" * 2000, "line 1: a number may have 1000 digits"),
        ("a: " + "[" * 5000 + "]" * 5000, "100 levels deep"),
        ("a: " + "[" * 150 + "]" * 150, "100 levels deep"),
        ("a: &a {b: *a}", "an alias stands within what it names"),
        ("a: &a [*a]", "an alias stands within what it names"),
        (NINES, f"more than {MOST_VALUES} values"),
        (MERGED_NINES, f"more than {MOST_VALUES} values"),
        ("a: 1\nb: 2\n'a': 3", "the key 'a' stands twice"),
        ("<<: 3", "not valid YAML"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: *b", "undefined alias"),
        ("a: \0", "not valid YAML"),
        ('a: "x\\0y"', "character of code 0"),
        ("--- 1\n--- 2", "not valid YAML"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_refused_in_one_line(text, line):
    with pytest.raises(UserError) as raised:
        parse_yaml(text, "x.yaml")
    message = str(raised.value)
    assert line in message and message.startswith("x.yaml") and "\n" not in message and len(message) < 500


def test_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_text("# " + "x" * (1 << 20))
    (tmp_path / "latin").write_bytes(b"a: \xe9")
    for name, line in (
        ("fifo", "no plain file"),
        (".", "no plain file"),
        ("large", "may have 1048576"),
        ("latin", "not valid YAML"),
        ("none", "No such file"),
        ("x" * 300, "too long"),
        ("latin/below", "Not a directory"),
    ):
        with pytest.raises(UserError, match=line):
            read_yaml(tmp_path / name)
