"""D3IL's recordings of its avoiding task: a folder of pickles, one for each demonstration (ALRhub/d3il, avoiding data).

A pickle holds a dictionary whose "robot" has, among others, `des_c_pos` and `c_pos` [T,3], setpoint and position of the
tool. Reading executes nothing (see `core.pickles`): the only names a pickle may use are those of numpy's arrays, and
what they are given is checked before it becomes an array.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError, one_line
from diffusion_rl.core.files import read_bytes
from diffusion_rl.core.pickles import Interpreter, Refused
from diffusion_rl.data.episodes import Episodes, join
from diffusion_rl.tasks.avoiding import modes_of

#: What DPPO pre-trains on: the gap of the third row is one of these two, those of the first rows are 1 and 2.
MODE_SETS = {"m1": (5, 6), "m2": (5, 7), "m3": (5, 8)}
REQUIRED = (1, 2)
FILTER_TOLERANCE = 0.01  # m; nearness to a row, in the reference's filter


@dataclass(frozen=True)
class Demonstration:
    """setpoints, positions [T,2] of the tool, each pair at the moment when the setpoint is given."""

    name: str
    setpoints: np.ndarray
    positions: np.ndarray

    @property
    def states(self) -> np.ndarray:
        """Returns what the policy sees, [T-1,4]."""
        return np.concatenate([self.setpoints, self.positions], axis=1)[:-1]

    @property
    def actions(self) -> np.ndarray:
        """Returns the changes of the setpoint, [T-1,2]."""
        return np.diff(self.setpoints, axis=0)

    @property
    def modes(self) -> tuple[int, ...]:
        """Returns the gaps it takes, as the reference's filter counts them."""
        return modes_of(self.positions, FILTER_TOLERANCE)


def read_folder(folder: str | Path) -> list[Demonstration]:
    """Reads all demonstrations of a folder, by name. Raises UserError if there is none, or one is damaged."""
    files = sorted(Path(folder).glob("*.pkl"))
    if not files:
        raise UserError(f"{folder} holds no .pkl files: give the folder of D3IL's avoiding recordings")
    return [read(file) for file in files]


def read(path: Path) -> Demonstration:
    """Reads one demonstration. Raises UserError for a file that is not one, or that holds more than arrays."""
    content = _load(path)
    robot = content.get("robot") if isinstance(content, dict) else None
    recorded = [robot.get(key) for key in ("des_c_pos", "c_pos")] if isinstance(robot, dict) else []
    arrays = [array for array in recorded if isinstance(array, np.ndarray)]
    if len(arrays) != 2:
        raise UserError(f"{path} is no D3IL recording: robot.des_c_pos and robot.c_pos are missing")
    setpoints, positions = (array.astype(np.float64) for array in arrays)
    if setpoints.ndim != 2 or setpoints.shape != positions.shape or setpoints.shape[1] != 3 or len(setpoints) < 2:
        raise UserError(f"{path}: des_c_pos {setpoints.shape} and c_pos {positions.shape} should both be [T, 3]")
    return Demonstration(path.stem, setpoints[:, :2], positions[:, :2])


def select(
    demonstrations: Sequence[Demonstration], desired: Sequence[int], required: Sequence[int] = REQUIRED
) -> list[Demonstration]:
    """Selects those that take all `required` gaps of the first rows and one of the `desired` ones of the third."""
    return [d for d in demonstrations if set(required) <= set(d.modes[:2]) and d.modes[2] in desired]


def as_episodes(demonstrations: Sequence[Demonstration]) -> Episodes:
    """Joins demonstrations in their own units, float32."""
    if not demonstrations:
        raise UserError("no demonstration takes the gaps asked for")
    parts = [{"states": d.states, "actions": d.actions} for d in demonstrations]
    return join([{k: x.astype(np.float32) for k, x in part.items()} for part in parts], "demonstrations")


class _Type:
    """Stands for a numpy dtype: a letter, a number of bytes, and a byte order."""

    def __init__(self, code: Any):
        if not isinstance(code, str) or not re.fullmatch(r"[fiu][1248]|b1", code):
            raise Refused(f"it holds arrays of {str(code)[:20]!r}")
        self.code = code

    def order(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise Refused("it holds a damaged dtype")
        self.code = state[1] + self.code[-2:]


class _Array:
    """Stands for a numpy array, whose content follows in the pickle."""

    content: np.ndarray | None = None

    def fill(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Type) or not isinstance(data, bytes) or not all(type(n) is int for n in shape):
            raise Refused("it holds a damaged array")
        self.content = np.frombuffer(data, kind.code).reshape(shape, order="F" if fortran else "C")


class _Arrays(Interpreter):
    """Knows the names that numpy's arrays are pickled with; nothing is looked up."""

    NAMES = (
        "numpy ndarray",
        "numpy dtype",
        "numpy.core.multiarray _reconstruct",
        "numpy._core.multiarray _reconstruct",
    )

    def find(self, name: str) -> str:
        if name not in self.NAMES:
            raise Refused(f"it asks for {name.replace(' ', '.')}")
        return name.split()[-1]

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if function == "_reconstruct":
            return _Array()
        if function == "dtype" and arguments:
            return _Type(arguments[0])
        raise Refused(f"it wants to call a {type(function).__name__}")

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, _Type):
            target.order(state)
        elif isinstance(target, _Array):
            target.fill(state)
        else:
            super().build(target, state)


def _load(path: Path) -> Any:
    """Reads a pickle of dictionaries and arrays."""
    payload = read_bytes(path)
    try:
        return _with_arrays(_Arrays().run(payload))
    except Exception as error:  # a damaged pickle can raise anything, and no more than that
        raise UserError(f"{path} refused: {one_line(error)}; nothing in it was executed") from error


def _with_arrays(content: Any) -> Any:
    """Replaces what stands for arrays by the arrays, once in each dictionary, however often it is referred to."""
    pending, seen = [content], set()
    while pending:
        node = pending.pop()
        if type(node) is dict and id(node) not in seen:
            seen.add(id(node))
            node.update({key: value.content for key, value in node.items() if isinstance(value, _Array)})
            pending += node.values()
    return content
