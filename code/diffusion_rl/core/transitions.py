"""Rows of experience as the algorithms see them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Transitions(NamedTuple):
    """A batch: obs, next_obs [B,To,O], actions [B,Ta,A] in [-1,1], all others [B].

    Attributes:
        rewards: of the whole chunk, scaled.
        terminated: 1 where nothing follows.
        returns: what a critic regresses on that has them given (rewards-to-go, or TD targets).
        advantages, weights: of actions, where an algorithm computes them before its updates.

    What an algorithm does not keep is None.
    """

    obs: Any
    actions: Any
    next_obs: Any = None
    rewards: Any = None
    terminated: Any = None
    returns: Any = None
    advantages: Any = None
    weights: Any = None
