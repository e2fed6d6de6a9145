"""Processes that train together do what one does: tests/replica_program.py with one, two and four of them."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.small_runs import make_base_policy, make_data

from diffusion_rl.config.compose import REPOSITORY

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
GATE = 1e-9


def train(what, n, folder, data, *more):
    paths = os.pathsep.join([str(REPOSITORY / "code"), str(REPOSITORY)])
    command = [sys.executable, "-m", "tests.replica_program", what, str(n), str(folder), str(data), *more]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(max((folder / "checkpoint").glob("*.safetensors"), key=os.path.getmtime))


def assert_near(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value, theirs[name], rtol=GATE, atol=GATE, err_msg=name)


@pytest.mark.parametrize("what", ["pretrain", "finetune"])
def test_two_and_four_train_as_one_and_resume(what, tmp_path):
    base = tmp_path / "base" / "base.safetensors"
    data = make_base_policy(base) if what == "finetune" else make_data(tmp_path / "data" / "train.npz")
    one = train(what, 1, tmp_path / "1", data)
    for n in (2, 4):
        assert_near(train(what, n, tmp_path / str(n), data), one)
    train(what, 2, tmp_path / "stopped", data, "+train.stop_at=2")
    resumed = train(what, 2, tmp_path / "stopped", data, f"++resume={tmp_path / 'stopped'}")
    for name, value in train(what, 2, tmp_path / "again", data).items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)
