"""The state of the Kuka stacking task (Janner et al. 2022, section 5.3), and its rewards.

  state [39]: the arm's 7 joints (rad), then 8 numbers for each of 4 blocks: position (m), quaternion (xyzw), and
      whether it hangs on the arm (1) or not (0)

A pair (i, j) stands for "block i above block j"; the 12 pairs are numbered i by i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_rl.core.typing import Rng

JOINTS, BLOCKS, BLOCK_DIM = 7, 4, 8
STATE_DIM = JOINTS + BLOCKS * BLOCK_DIM
POSE_DIM = 7  # of a block: position and quaternion
PAIRS = [(i, j) for i in range(BLOCKS) for j in range(BLOCKS) if i != j]
BEST_RETURN = 3.0  # four blocks in one tower
TASKS = ("unconditional", "conditional", "rearrangement")

Pair = tuple[int, int]


def blocks_of(states: np.ndarray) -> np.ndarray:
    """Splits the blocks [...,4,8] from states [...,39]."""
    return states[..., JOINTS:].reshape(*states.shape[:-1], BLOCKS, BLOCK_DIM)


def stacked(states: np.ndarray) -> np.ndarray:
    """Whether each pair stands in states [...,39], attached or not, bool [...,12]; the classifier learns this.

    Block i is above j if it is higher, by however little, and less than 10 cm away in the plane.
    """
    position = blocks_of(states)[..., :3]
    return np.stack([_near(position, i, j, 0.1) & (_above(position, i, j) > 0) for i, j in PAIRS], axis=-1)


def standing(state: np.ndarray) -> list[Pair]:
    """Returns the pairs of a state [39] that earn a reward, in their order.

    Both blocks are loose, less than 20 cm apart in the plane and more than 5 cm in height. (The reference looks twice
    whether block i is loose and never whether j is.)
    """
    blocks = blocks_of(state)
    loose, position = blocks[:, -1] <= 0.5, blocks[:, :3]
    return [
        (i, j)
        for i, j in PAIRS
        if loose[i] and loose[j] and _near(position, i, j, 0.2) and _above(position, i, j) > 0.05
    ]


def _near(position: np.ndarray, i: int, j: int, distance: float) -> np.ndarray:
    return np.linalg.norm(position[..., i, :2] - position[..., j, :2], axis=-1) < distance


def _above(position: np.ndarray, i: int, j: int) -> np.ndarray:
    return position[..., i, 2] - position[..., j, 2]


class Count(NamedTuple):
    """Counts what an episode has been rewarded for.

    Attributes:
        wanted: pairs in the order they are to be built in; None: any tower.
        seen: pairs that stood at some time, each of which counts once; of `wanted` the first so many.
    """

    wanted: tuple[Pair, ...] | None = None
    seen: frozenset[Pair] = frozenset()

    @property
    def next(self) -> Pair | None:
        """Returns the pair to build (the last one where all stand); None if no order is asked for."""
        return None if self.wanted is None else self.wanted[min(len(self.seen), len(self.wanted) - 1)]

    @property
    def total(self) -> float:
        """Returns the return so far, at most 3: blocks below the top of the highest tower, or the share of `wanted`."""
        if self.wanted is None:
            return float(max(sum(i == top for i, _ in self.seen) for top in range(BLOCKS)))
        return BEST_RETURN * len(self.seen) / len(self.wanted)

    def after(self, state: np.ndarray) -> Count:
        """Returns the count after a state [39]."""
        seen = set(self.seen)
        for pair in standing(state):
            if self.wanted is None or (len(seen) < len(self.wanted) and pair == self.wanted[len(seen)]):
                seen.add(pair)
        return self._replace(seen=frozenset(seen))


def draw_task(task: str, rng: Rng) -> Count:
    """Draws a new episode's goal.

    It is none (unconditional), a tower of all blocks in a drawn order (conditional), or drawn pairs, no block of which
    moves twice or once another is to lie on it (rearrangement).
    """
    if task == "unconditional":
        return Count()
    if task == "conditional":
        order = rng.permutation(BLOCKS).tolist()
        return Count(tuple(zip(order[1:], order[:-1], strict=True)))
    return Count(tuple(_rearrangement(rng)))


def _rearrangement(rng: Rng) -> Sequence[Pair]:
    tops, bottoms, pairs = list(range(BLOCKS)), list(range(BLOCKS)), list[Pair]()
    while tops:
        bottom, top = (blocks[int(rng.integers(0, len(blocks), (1,))[0])] for blocks in (bottoms, tops))
        if top != bottom:
            pairs.append((top, bottom))
            bottoms.remove(bottom)
            tops = [block for block in tops if block not in (top, bottom)]
    return pairs
