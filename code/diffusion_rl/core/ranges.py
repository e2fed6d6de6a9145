"""Numbers that people give, held to the range in which they make sense."""

from __future__ import annotations

import math

from diffusion_rl.core.errors import UserError

LARGEST_SEED = 2**31 - 1


def require_range(
    name: str, value: float, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf
) -> None:
    """Raise UserError unless a finite value is at least `least`, at most `most` and greater than `above`."""
    if math.isfinite(value) and least <= value <= most and value > above:
        return
    lower = f"at least {least:g}" if least > -math.inf else f"above {above:g}" if above > -math.inf else ""
    upper = f"at most {most:.10g}" if most < math.inf else ""
    raise UserError(f"{name} {value} must be {' and '.join(filter(None, (lower, upper))) or 'a finite number'}")


def require_seed(value: int) -> None:
    """Raise UserError unless `--seed` is one that every generator takes."""
    require_range("--seed", value, 0, LARGEST_SEED)
