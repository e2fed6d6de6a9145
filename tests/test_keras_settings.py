"""Neither ~/.keras/keras.json nor what was imported before decides how networks are made."""

import json
import os
import subprocess
import sys

import pytest

USE = """
from diffusion_rl.core.keras import floatx, keras
import tensorflow as tf
from diffusion_rl.networks.gmm import GMMMLP
from diffusion_rl.policies.gmm import GMMPolicy
policy = GMMPolicy(GMMMLP(2, 3, 4, [8, 8], fixed_std=0.1), 3)
log_prob = policy.log_probs({"state": tf.zeros([5, 1, 4])}, tf.zeros([5, 3, 2]))[0]
dense = keras.layers.Dense(2)
dense.build([None, 3])
print(floatx(), dense.kernel.dtype.name, keras.backend.image_data_format(), keras.backend.epsilon())
print(log_prob.dtype.name, log_prob.shape)
"""


@pytest.mark.parametrize(
    ("before", "floatx"), [pytest.param("import tf_keras", "float64", marks=pytest.mark.slow), ("", "float16")]
)
def test_settings_and_earlier_imports_do_not_matter(tmp_path, before, floatx):
    (tmp_path / ".keras").mkdir()
    settings = {"floatx": floatx, "image_data_format": "channels_first", "epsilon": 1e-3, "backend": "torch"}
    (tmp_path / ".keras" / "keras.json").write_text(json.dumps(settings))
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    ended = subprocess.run(
        [sys.executable, "-c", f"{before}\n{USE}"],
        env=environment | {"HOME": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines()[-2:] == ["float32 float32 channels_last 1e-07", "float32 (5,)"]
