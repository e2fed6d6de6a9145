"""Diffusion-policy reinforcement learning in TensorFlow/Keras."""

import os

from diffusion_rl.core import moved

# TensorFlow reads these when it is imported: keep its log noise off the user's terminal, and Keras 2 as the Keras.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

__version__ = "0.1.0"

moved.install()
