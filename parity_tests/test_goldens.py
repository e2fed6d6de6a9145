"""Every recorded case of a folder: `pytest parity_tests/test_goldens.py --golden-dir DIR` (default: shipped)."""

from pathlib import Path

import pytest

from parity_tests.replay.dispatch import NotImplementedCase, replay
from parity_tests.replay.files import GOLDENS, case_files


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--golden-dir") or GOLDENS
    files = case_files(folder)
    metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])


def test_golden(golden_file: Path):
    try:
        replay(golden_file)
    except NotImplementedCase as missing:
        pytest.skip(str(missing))
