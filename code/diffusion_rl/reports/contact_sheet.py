"""Videos at a glance: a row of pictures for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file

GAP = 4  # white pixels between pictures


def contact_sheet(videos: Sequence[str | os.PathLike], output: str | os.PathLike, columns: int, command: str) -> Path:
    """Writes a PNG with `columns` frames of each video, evenly spaced from its first to its last.

    Raises UserError for a video that cannot be read, or of another size than the first.
    """
    from matplotlib.image import imsave

    rows = [_row(frames(video), columns) for video in videos]
    for video, row in zip(videos, rows, strict=True):
        if row.shape != rows[0].shape:
            raise UserError(f"{video}: its frames have another size than those of {videos[0]}; make two sheets")
    sheet = np.concatenate([np.concatenate([row, _white(GAP, row.shape[1])]) for row in rows])
    with atomic_file(output) as file:
        imsave(file, sheet[:-GAP], format="png", metadata={"Description": command})
    return Path(output)


def frames(video: str | os.PathLike) -> list[np.ndarray]:
    """Returns all frames [Hi,Wi,3] uint8 of a video."""
    try:
        import imageio.v2 as imageio
    except ImportError as error:
        raise UserError('reading videos needs pip install "imageio[ffmpeg]"') from error
    try:
        with imageio.get_reader(os.fspath(video)) as opened:
            reader: Any = opened  # whose class declares no iteration
            pictures = [np.asarray(frame) for frame in reader]
    except (OSError, ValueError, RuntimeError, IndexError, ImportError) as error:
        raise UserError(f"{video}: cannot be read as a video ({error})".split("\n")[0]) from error
    if not pictures:
        raise UserError(f"{video}: no frames in it")
    return pictures


def _row(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    chosen = [pictures[i] for i in np.linspace(0, len(pictures) - 1, columns).round().astype(int)]
    gap = _white(len(chosen[0]), GAP)
    return np.concatenate([part for picture in chosen for part in (picture, gap)][:-1], axis=1)


def _white(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 255, np.uint8)
