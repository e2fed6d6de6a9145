"""Where what ships with the package lies, in a checkout and in an installed package; where data are looked for, and
where programs write.

In a checkout cfg/, data/, changed_robomimic/ and the scripts lie beside code/. A wheel carries them in `shipped/` of
the package (setup.py), but for the larger data (MANIFEST.in); what is made or downloaded goes to the user's cache then.

Environment: DPPO_DATA_DIR   the data directory (default: `data/` of the checkout; of an installed package
                             `diffusion-rl/data` in XDG_CACHE_HOME or ~/.cache, and what ships)
             DPPO_LOG_DIR    where programs write (default: `log`, `logs`, `results` and `figure` of the present folder)
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = (_PACKAGE / "shipped").is_dir()
REPOSITORY = _PACKAGE / "shipped" if INSTALLED else _PACKAGE.parents[1]
SHIPPED_DATA = REPOSITORY / "data"


def here_or_shipped(path: str | os.PathLike[str]) -> Path:
    """Returns a path that exists here, else the one of its name among what ships where there is one, else itself."""
    here, shipped = Path(path).expanduser(), REPOSITORY / path
    return shipped if shipped.exists() and not here.exists() else here


def output_folder(usual: str) -> str:
    """Returns where a program writes unless it is told otherwise: `usual`, below $DPPO_LOG_DIR where that is set."""
    return os.path.join(os.environ.get("DPPO_LOG_DIR") or "", usual)


def log_dir() -> Path:
    """Returns the folder of the run folders."""
    return Path(os.environ.get("DPPO_LOG_DIR") or "log")


def data_dir() -> Path:
    """Returns the data directory, which data are written to."""
    return _data_dirs()[0]


def data_folder(name: str | os.PathLike[str]) -> Path:
    """Returns a folder of the data directory. One that is not there is that of what ships: files of two places, which
    need not fit each other, are not mixed."""
    folders = [place / name for place in _data_dirs()]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def data_file(path: Path) -> Path:
    """Returns where a file lies below the data directory: `path` is relative to it, or lies in it."""
    places = _data_dirs()
    for place in places if os.environ.get("DPPO_DATA_DIR") else (Path("data"), *places):
        if path.is_relative_to(place):
            path = path.relative_to(place)
            break
    return data_folder(path.parent) / path.name


def _data_dirs() -> list[Path]:
    if configured := os.environ.get("DPPO_DATA_DIR"):
        return [Path(configured).expanduser()]
    if not INSTALLED:
        return [SHIPPED_DATA]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return [cache / "diffusion-rl" / "data", SHIPPED_DATA]
