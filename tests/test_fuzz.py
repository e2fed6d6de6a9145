"""Mutated files of all formats that are read (see `tests.fuzz`): nothing is executed, hangs, or ends in a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz import BYTES, FORMATS

QUICK = 6  # the first sixth of the inputs; make test-slow reads all
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space, /proc")
@pytest.mark.parametrize("share", [QUICK, pytest.param(1, marks=pytest.mark.slow, id="all")])
def test_mutated_files_are_read_or_refused_in_one_line(share):
    counts = {name: FORMATS[name][3] // share for name in FORMATS}
    command = [sys.executable, "-m", "tests.fuzz", *(f"{name}:{count}" for name, count in counts.items())]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    results = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [result["format"] for result in results] == list(FORMATS)
    for result in results:
        assert not result["problems"], (result["format"], result["problems"][:5])
        assert 0 < result["peak"] < BYTES and result["last"]["number"] == counts[result["format"]] - 1
