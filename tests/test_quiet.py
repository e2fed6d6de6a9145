"""TensorFlow is imported without its lines, whoever imports it."""

import os
import subprocess
import sys

PROGRAM = "import diffusion_rl, tensorflow as tf; print(tf.zeros(2).numpy().tolist(), tf.__spec__.loader.get_source)"


def test_nothing_is_written_to_standard_error():
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0.0, 0.0]")
    assert done.stderr == ""
