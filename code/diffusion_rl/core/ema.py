"""Exponential moving averages of weights."""

from __future__ import annotations

from typing import Any


def ema_update(old: Any, new: Any, decay: float) -> Any:
    """old * decay + (1 - decay) * new, for arrays or tensors of any shape."""
    return old * decay + (1 - decay) * new
