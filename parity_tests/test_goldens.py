"""Every recorded case of a folder: `pytest parity_tests/test_goldens.py --golden-dir DIR` (default: shipped)."""

from pathlib import Path

import pytest

from parity_tests.replay import agents
from parity_tests.replay.dispatch import NotImplementedCase, replay
from parity_tests.replay.files import GOLDENS, Golden, case_files


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--golden-dir") or GOLDENS
    files = case_files(folder)
    if metafunc.function is test_plain_form_compiled:
        names = (file for file in files if file.stem.startswith("agent_") and "pretrain" not in file.stem)
        files = [file for file in names if Golden.load(file).kind == "agent"]
    metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])


def test_golden(golden_file: Path):
    try:
        replay(golden_file)
    except NotImplementedCase as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
def test_plain_form_compiled(golden_file: Path):
    agents.replay_compiled_plain(Golden.load(golden_file))
