"""What an environment draws from, to be kept and taken back: an episode can be repeated from its first step on."""

from __future__ import annotations

import random
from typing import Any

import gymnasium
import numpy as np

State = dict[str, Any]


def generators(env: gymnasium.Env) -> list[np.random.Generator]:
    """Returns the environment's own generators: what its `generators` says, or else gymnasium's, if it was seeded."""
    inner = env.unwrapped
    if hasattr(inner, "generators"):
        return list(inner.generators())
    own = getattr(inner, "_np_random", None)
    return [] if own is None else [own]


def capture(env: gymnasium.Env) -> State:
    """Returns the states of all generators that the environment may draw from: numpy's and Python's, and its own."""
    own = [generator.bit_generator.state for generator in generators(env)]
    return {"numpy": np.random.get_state(), "python": random.getstate(), "own": own}


def restore(env: gymnasium.Env, state: State) -> None:
    """Takes back what `capture` returned, of an environment that was built alike."""
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if state["own"] and not generators(env):
        _ = env.unwrapped.np_random  # gymnasium makes it when it is first asked for
    for generator, saved in zip(generators(env), state["own"], strict=True):
        generator.bit_generator.state = saved
