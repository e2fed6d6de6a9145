"""D3IL's recordings of its avoiding task: a folder of pickles, one for each demonstration (ALRhub/d3il, avoiding data).

A pickle holds a dictionary whose "robot" has, among others, `des_c_pos` and `c_pos` [T,3], setpoint and position of the
tool. Reading executes nothing: the only names a pickle may use are those of numpy's arrays, and what stands behind them
here are classes that keep what they are given, checked before it becomes an array.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.avoiding import modes_of
from diffusion_rl.core.errors import UserError
from diffusion_rl.data.episodes import Episodes, check

#: What DPPO pre-trains on: the gap of the third row is one of these two, those of the first rows are 1 and 2.
MODE_SETS = {"m1": (5, 6), "m2": (5, 7), "m3": (5, 8)}
REQUIRED = (1, 2)
FILTER_TOLERANCE = 0.01  # m; nearness to a row, in the reference's filter


@dataclass(frozen=True)
class Demonstration:
    """setpoints, positions [T, 2]: of the tool, each pair at the moment when the setpoint is given."""

    name: str
    setpoints: np.ndarray
    positions: np.ndarray

    @property
    def states(self) -> np.ndarray:
        """[T-1, 4] what the policy sees."""
        return np.concatenate([self.setpoints, self.positions], axis=1)[:-1]

    @property
    def actions(self) -> np.ndarray:
        """[T-1, 2] changes of the setpoint."""
        return np.diff(self.setpoints, axis=0)

    @property
    def modes(self) -> tuple[int, ...]:
        """The gaps it takes, as the reference's filter counts them."""
        return modes_of(self.positions, FILTER_TOLERANCE)


def read_folder(folder: str | Path) -> list[Demonstration]:
    """All demonstrations of a folder, by name. Raises UserError if there is none, or for a file that is not one."""
    files = sorted(Path(folder).glob("*.pkl"))
    if not files:
        raise UserError(f"{folder} holds no .pkl files: give the folder of D3IL's avoiding recordings")
    return [read(file) for file in files]


def read(path: Path) -> Demonstration:
    """One demonstration. Raises UserError for a file that is not one, or that holds more than arrays."""
    content = _load(path)
    try:
        robot = content["robot"]
        setpoints, positions = (np.asarray(robot[key], dtype=np.float64) for key in ("des_c_pos", "c_pos"))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no D3IL recording: robot.des_c_pos and robot.c_pos are missing") from error
    if setpoints.ndim != 2 or setpoints.shape != positions.shape or setpoints.shape[1] != 3 or len(setpoints) < 2:
        raise UserError(f"{path}: des_c_pos {setpoints.shape} and c_pos {positions.shape} should both be [T, 3]")
    return Demonstration(path.stem, setpoints[:, :2], positions[:, :2])


def select(
    demonstrations: Sequence[Demonstration], desired: Sequence[int], required: Sequence[int] = REQUIRED
) -> list[Demonstration]:
    """Those that take all the `required` gaps of the first rows and one of the `desired` ones of the third."""
    return [d for d in demonstrations if set(required) <= set(d.modes[:2]) and d.modes[2] in desired]


def as_episodes(demonstrations: Sequence[Demonstration]) -> Episodes:
    """One after the other, in their own units, float32."""
    if not demonstrations:
        raise UserError("no demonstration takes the gaps asked for")
    lengths = np.array([len(d.actions) for d in demonstrations])
    episodes = Episodes(
        states=np.concatenate([d.states for d in demonstrations]).astype(np.float32),
        actions=np.concatenate([d.actions for d in demonstrations]).astype(np.float32),
        traj_lengths=lengths,
    )
    check(episodes, "demonstrations")
    return episodes


class _Type:
    """Stands in for a numpy dtype: a number of so many bytes, in this or that byte order."""

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or not re.fullmatch(r"[fiu][1248]|b1", code):
            raise pickle.UnpicklingError(f"arrays of {code!r}")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a damaged dtype")
        self.code = order + self.code


class _Array:
    """Stands in for a numpy array."""

    content: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Type) or not isinstance(data, bytes) or not all(type(n) is int for n in shape):
            raise pickle.UnpicklingError("a damaged array")
        self.content = np.frombuffer(data, kind.code).reshape(shape, order="F" if fortran else "C")


class _Name:
    """Stands in for the class `numpy.ndarray`, which only names what `_reconstruct` is to make."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_KNOWN = {("numpy", "ndarray"): _Name, ("numpy", "dtype"): _Type} | {
    (f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _load(path: Path) -> Any:
    """What a pickle of dictionaries and arrays holds."""
    try:
        return _plain(_Unpickler(io.BytesIO(path.read_bytes())).load())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise anything, and no more than that
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise UserError(f"{path} refused: {reason}; nothing in it was executed") from error


def _plain(content: Any) -> Any:
    if isinstance(content, _Array):
        return content.content
    return {key: _plain(value) for key, value in content.items()} if type(content) is dict else content
