"""LeRobot's data sets (folders of versions 2 and 3, Cadene et al. 2024): `meta/info.json` and Parquet below `data/`.

A row is a step: `episode_index`, `frame_index`, `observation.state [O]`, `action [A]` and, of simulators,
`next.reward`. Its `next.done` is left aside: it marks the end of a recording, so nothing here is terminal. Pictures lie
in videos, which are not read. Parquet is read by pyarrow (extra `lerobot`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError, listed
from diffusion_rl.core.files import read_json, reading
from diffusion_rl.core.npz import Allowance
from diffusion_rl.data.episodes import Episodes, join

_ORDER = ("episode_index", "frame_index")
_REWARD = "next.reward"
_STATES = ("observation.state", "observation.environment_state")  # where a folder has both, both are the state
_CURE = "get the data set again"


def recognises(folder: Path) -> bool:
    """Whether the folder has this layout."""
    return (folder / "meta" / "info.json").is_file()


def read(folder: Path, obs_keys: Sequence[str] = ()) -> Episodes:
    """Reads all episodes in numerical order; `obs_keys` choose what the state is made of."""
    info = read_json(folder / "meta" / "info.json")
    features = info.get("features") if isinstance(info, dict) else None
    if not isinstance(features, dict):
        raise UserError(f"{folder}/meta/info.json names no features: {_CURE}")
    keys = list(obs_keys) or [key for key in _STATES if key in features]
    wanted = [*_ORDER, *keys, "action", *[_REWARD] * (_REWARD in features)]
    if not keys or (missing := [key for key in wanted if key not in features]):
        problem = f"no {', '.join(missing)}" if keys else f"no {_STATES[0]}"
        raise UserError(f"{folder}: {problem}; choose with --obs-keys from {listed(sorted(features), 40)}")
    files = sorted((folder / "data").glob("*/*.parquet"))
    parts = [_columns(file, wanted) for file in files]
    rows = sum(len(part["action"]) for part in parts)
    if not rows or rows != info.get("total_frames", rows):
        raise UserError(f"{folder}: {rows} of {info.get('total_frames')} steps are there; {_CURE}")
    columns = {key: np.concatenate([part[key] for part in parts]) for key in wanted}
    order = np.lexsort((columns["frame_index"][:, 0], columns["episode_index"][:, 0]))
    columns = {key: value[order] for key, value in columns.items()}
    starts = np.flatnonzero(np.diff(columns["episode_index"][:, 0])) + 1
    return join([_episode(columns, keys, part) for part in np.split(np.arange(rows), starts)], str(folder))


def _episode(columns: dict[str, np.ndarray], keys: Sequence[str], rows: np.ndarray) -> dict[str, np.ndarray]:
    episode = {
        "states": np.concatenate([columns[key][rows] for key in keys], axis=1),
        "actions": columns["action"][rows],
        "terminals": np.zeros(len(rows), bool),
    }
    return episode | ({"rewards": columns[_REWARD][rows, 0]} if _REWARD in columns else {})


def _columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads columns of numbers of one file, each as [L,D]."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError('LeRobot\'s data sets need pyarrow: pip install "diffusion-rl[lerobot]"') from error
    with reading(path, _CURE, "is no Parquet file, or it is damaged"):
        file = parquet.ParquetFile(path)
        if absent := [name for name in names if name not in file.schema_arrow.names]:
            raise UserError(f"{path} lacks {', '.join(absent)}: {_CURE}")
        allowance, chunks = Allowance(path), []
        for group in range(file.metadata.num_row_groups):
            found = file.metadata.row_group(group)
            allowance.take(sum(8 * found.column(i).num_values for i in range(found.num_columns)), "a group of rows")
        for batch in file.iter_batches(columns=list(names)):
            chunks.append({name: _array(batch.column(batch.schema.get_field_index(name)), name) for name in names})
        return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in names}


def _array(column: Any, name: str) -> np.ndarray:
    """Turns a column of numbers, or of lists of as many numbers each, into [L,D]."""
    from pyarrow import compute

    rows, lists = len(column), hasattr(column.type, "value_type")
    values = column.flatten() if lists else column
    array = values.to_numpy(zero_copy_only=False)
    uneven = lists and len(set(compute.list_value_length(column).to_pylist())) > 1
    if array.dtype.kind not in "biuf" or values.null_count or column.null_count or uneven:
        raise ValueError(f"{name} holds something else than rows of as many numbers each")
    return array.reshape(rows, -1) if rows else array.reshape(0, 1)
