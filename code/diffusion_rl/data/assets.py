"""Where data and pre-trained policies lie, and how to fetch those that do not ship with the repository.

`assets.json` beside this file lists what can be fetched: name -> destination (below the data directory), urls (mirrors
in order of preference), sha256, size in bytes. Only files whose sha256 is known are listed. A file is downloaded to
`<destination>.part`, continued where an earlier attempt stopped, checked, and only then renamed.

Environment: DPPO_DATA_DIR   the data directory (default: `data/` of the repository)
             DPPO_ASSETS_DIR a folder that holds the files under their destination or bare file names: looked at first
             DPPO_OFFLINE=1  never touch the network
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file, require_file

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 3  # for each mirror; every attempt continues where the last one stopped

Report = Callable[[int, int | None], None]  # bytes so far, bytes in total if known


@dataclass(frozen=True)
class Asset:
    """A file that can be fetched. `destination` is relative to the data directory, `size` in bytes."""

    name: str
    destination: str
    urls: Sequence[str]
    sha256: str
    size: int | None = None


def data_dir() -> Path:
    """Returns the data directory: DPPO_DATA_DIR, by default `data/` of the repository."""
    configured = os.environ.get("DPPO_DATA_DIR")
    return Path(configured).expanduser() if configured else Path(__file__).resolve().parents[3] / "data"


def manifest(path: Path | None = None) -> dict[str, Asset]:
    """Reads which files can be fetched, by name."""
    path = path or Path(__file__).with_name("assets.json")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {name: Asset(name=name, **entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the list of downloadable files {path}: {error}") from error


def resolve(path: str | os.PathLike, assets: Mapping[str, Asset] | None = None) -> Path:
    """Finds a file: itself if it exists, else the manifest's file for it, fetched if need be.

    `path` may be absolute, relative to the current directory, relative to the data directory, or a manifest name.
    """
    file = Path(path).expanduser()
    for candidate in (file, data_dir() / file):
        if os.path.isfile(candidate):
            return candidate
    assets = manifest() if assets is None else assets
    asset = assets.get(str(path)) or _by_destination(file, assets)
    if asset is None:
        return require_file(file, f"no such file: {file}; {_cure(file)}")  # which it is not: says what it is
    return fetch(asset)


def _by_destination(path: Path, assets: Mapping[str, Asset]) -> Asset | None:
    absolute = os.path.abspath(path)
    for asset in assets.values():
        if absolute == os.path.abspath(data_dir() / asset.destination) or path == Path(asset.destination):
            return asset
    return None


def _cure(path: Path) -> str:
    if path.name in ("train.npz", "val.npz", "normalization.npz"):
        return "make it with `python script/dataset/convert.py SOURCE OUT_DIR`, or set DPPO_DATA_DIR to where it lies"
    if path.name.startswith("pre_"):
        return f"pre-train one (--config-name={path.stem} of cfg/<suite>/pretrain), and set base_policy_path to it"
    return "nothing in the list of downloadable files has this name either; check the path or set DPPO_DATA_DIR"


def fetch(asset: Asset, report: Report | None = None) -> Path:
    """Returns the asset's path below the data directory; fetches and checks it first if it is not there."""
    destination = data_dir() / asset.destination
    if destination.is_file():
        return destination
    local = _local_copy(asset)
    if local is not None:
        _require_hash(local, asset, delete=False)
        return _install(local, destination)
    if os.environ.get("DPPO_OFFLINE", "") not in ("", "0"):
        raise UserError(
            f"{asset.name} is not here and DPPO_OFFLINE is set: get it from {' or '.join(asset.urls)} "
            f"and put it at {destination}"
        )
    return _download_from_mirrors(asset, destination, report or _Progress(asset.name))


def _local_copy(asset: Asset) -> Path | None:
    folder = os.environ.get("DPPO_ASSETS_DIR")
    if not folder:
        return None
    if folder.startswith("file://"):
        folder = urllib.request.url2pathname(folder[len("file://") :])
    base = Path(folder).expanduser()
    if not base.is_dir():
        raise UserError(f"DPPO_ASSETS_DIR={folder} is not a directory")
    candidates = (base / asset.destination, base / Path(asset.destination).name)
    return next((c for c in candidates if c.is_file()), None)


def _install(source: Path, destination: Path) -> Path:
    with atomic_file(destination) as target, open(source, "rb") as file:
        shutil.copyfileobj(file, target)
    return destination


def _download_from_mirrors(asset: Asset, destination: Path, report: Report) -> Path:
    partial = destination.with_name(destination.name + ".part")
    failures = []
    for url in asset.urls:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            _download(url, partial, asset.size, report)
            _require_hash(partial, asset, delete=True)
            partial.replace(destination)
            return destination
        except (urllib.error.URLError, ConnectionError, TimeoutError, HTTPException, _Incomplete, UserError) as error:
            failures.append(f"{url}: {getattr(error, 'reason', None) or error}")
        except OSError as error:
            raise UserError(f"cannot write {destination}: {error.strerror or error}") from error
    raise UserError(
        f"could not get {asset.name} ({'; '.join(failures) or 'no url listed'}); "
        f"get it by other means and put it at {destination}, or in a folder named by DPPO_ASSETS_DIR"
    )


class _Incomplete(Exception):
    """The connection ended before the file did."""


def _download(url: str, partial: Path, size: int | None, report: Report) -> None:
    """Fetches `url` into `partial`, continuing what is there; tries again as long as bytes keep coming."""
    attempts = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            return _attempt(url, partial, size, report)
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # what we hold is not a prefix of the file: begin anew
                partial.unlink()
            elif error.code < 500:
                raise
            failure: Exception = error
        except (urllib.error.URLError, ConnectionError, TimeoutError, HTTPException, _Incomplete) as error:
            failure = error
        progressed = partial.exists() and partial.stat().st_size > before
        attempts = 0 if progressed else attempts + 1
        if attempts >= _ATTEMPTS:
            raise failure
        time.sleep(0.1 * 2**attempts)


def _attempt(url: str, partial: Path, size: int | None, report: Report) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    if size is not None and have >= size:
        if have > size:
            partial.unlink()
            raise _Incomplete(f"the partial file was longer than the {size} bytes expected")
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        continued = response.status == 206
        if not continued:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else size
        with open(partial, "ab" if continued else "wb") as f:
            while chunk := response.read(_CHUNK):
                f.write(chunk)
                have += len(chunk)
                report(have, total)
    if total is not None and have < total:
        raise _Incomplete(f"the connection ended after {have} of {total} bytes")


def sha256(path: Path) -> str:
    """Returns the hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _require_hash(path: Path, asset: Asset, delete: bool) -> None:
    digest = sha256(path)
    if digest != asset.sha256:
        if delete:
            path.unlink()
        raise UserError(f"{path.name}: sha256 is {digest}, expected {asset.sha256}")


class _Progress:
    """Shows percentage, rate and time left in a line of the terminal; elsewhere prints a line every ten seconds."""

    def __init__(self, label: str):
        self.label, self.start, self.last = label, time.monotonic(), 0.0
        self.first: int | None = None

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done
        finished = total is not None and done >= total
        tty = sys.stderr.isatty()
        if not finished and now - self.last < (0.2 if tty else 10.0):
            return
        self.last = now
        rate = max(done - self.first, 1) / max(now - self.start, 1e-3)
        text = f"{self.label}: {done / 1e6:.1f} MB"
        if total is not None:
            percent, left = 100 * done / max(total, 1), max(total - done, 0) / rate
            text += f" of {total / 1e6:.1f} ({percent:.0f}%), {left:.0f} s left"
        text += f", {rate / 1e6:.1f} MB/s"
        sys.stderr.write(f"\r{text:<79}" + ("\n" if finished else "") if tty else text + "\n")
        sys.stderr.flush()
