"""How TensorFlow uses the processor's cores."""

from __future__ import annotations

import logging
import os

import tensorflow as tf

from diffusion_rl.core.quiet import without_stderr

SHARED = 8  # threads that share one product at the most: the products here are too small for more


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_gpu() -> bool:
    """Returns whether TensorFlow computes on a GPU, where work stays whole: it has no cores to be dealt to."""
    return bool(tf.config.list_logical_devices("GPU"))


def sharing() -> int:
    """Returns how many threads share one product where products do not run side by side."""
    return min(cores(), SHARED)


def configure_threads(shared: bool = False) -> None:
    """Gives each operation one thread, and runs several operations at a time. To be called before TensorFlow does
    anything.

    The matrices here are small: sharing one product between threads costs 15 to 25 % of the processor's time, running
    independent parts of an update side by side costs nothing (measured, see benchmarks/README.md).

    Args:
        shared: all threads for each operation instead, for updates that have no independent parts.
    """
    try:
        tf.config.threading.set_intra_op_parallelism_threads(sharing() if shared else 1)
        tf.config.threading.set_inter_op_parallelism_threads(cores())
    except RuntimeError:  # TensorFlow is running already: a second job of a multirun
        pass


def silence_compiler() -> None:
    """Makes XLA print its line of every process ("Compiled cluster using XLA!") now, where nobody has to read it.

    TensorFlow's advice on functions that are traced often goes, too: each job of a multirun compiles its own.
    """
    logging.getLogger("tensorflow").addFilter(lambda record: "tf.function retracing" not in record.getMessage())
    with without_stderr():
        tf.function(lambda x: x + x, jit_compile=True)(tf.zeros([]))
