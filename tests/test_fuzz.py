"""Mutated files of all formats that are read (see `tests.fuzz`): nothing is executed, hangs, or ends in a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz import BYTES, FORMATS

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space, /proc")
@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_or_refused_in_one_line(name):
    ended = subprocess.run([sys.executable, "-m", "tests.fuzz", name], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert not result["problems"], result["problems"][:5]
    assert 0 < result["peak"] < BYTES and result["last"]["number"] == FORMATS[name][3] - 1
