"""Where data and pre-trained policies lie, and how to fetch those that do not ship with the repository.

`assets.json` beside this file lists what the authors of DPPO and of the planners published, in groups by the folder
that it goes to (`data`, `log`, `logs`): name (the path below that folder) -> address, and size in bytes and sha256
where they are known. gdown fetches, from Drive and from any other server. A file gets its name only once it is complete
and checked; its sha256 then stands in `<file>.sha256` and is compared whenever the file is asked for.

Environment: DPPO_DATA_DIR   the data directory (core/places.py)
             DPPO_LOG_DIR    run folders, and the authors' policies (default: `log`)
             DPPO_ASSETS_DIR a folder, or a server's address, that holds the files under their names: used instead
             DPPO_OFFLINE=1  never touch the network
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_rl.core.errors import UserError, one_line
from diffusion_rl.core.files import atomic_file, lock_file, read_bytes, read_json, require_file, write_bytes
from diffusion_rl.core.places import (
    INSTALLED,
    REPOSITORY,
    SHIPPED_DATA,
    data_dir,
    data_file,
    data_folder,
    log_dir,
    output_folder,
)

_TIMEOUT = 30.0  # seconds without a byte
_RETRIES = 3  # after a connection that broke, each going on where the last one stopped
_MOST = 16 << 30  # bytes of a file whose size is not known
_LEFT_OUT = ("train", "sac_actor", "simulator_states")  # of a wheel, where they are large
_DRIVE = "https://drive.google.com/uc?id="


@dataclass(frozen=True)
class Asset:
    """A file that can be fetched, or all files of a folder of Drive.

    Attributes:
        name: where it goes, relative to `root`; that of a folder ends with "/".
        url: of the file, or of the folder of Drive that holds it.
        root: the folder of its group.
        folder: of a policy, which data (below the data directory) it was trained with.
        default_for: which of our policies in `folder` it is taken for where there is none.
        size: in bytes. sha256: hexadecimal. None: unknown.
        instead: what else can be done; "": what is known of its name.
    """

    name: str
    url: str
    root: Path
    folder: str = ""
    default_for: str = ""
    size: int | None = None
    sha256: str | None = None
    instead: str = ""

    @property
    def destination(self) -> Path:
        """Where the file lies once it is here."""
        return self.root / self.name

    @property
    def stands_for(self) -> Path:
        """The file that a configuration of ours asks for."""
        return data_dir() / self.folder / f"{self.default_for}.safetensors" if self.default_for else self.destination

    def is_meant_by(self, path: Path) -> bool:
        """Whether a path is this file's, or that of ours that it is taken for."""
        own = {os.path.abspath(self.destination), os.path.abspath(self.stands_for)}
        run = self.folder and Path(self.name).parts[-4:] == path.parts[-4:]  # as the reference recognises its policies
        return bool(run) or str(path) == self.name or not own.isdisjoint(map(os.path.abspath, _places(path)))

    def cure(self) -> str:
        """Returns what to do where it cannot be downloaded."""
        instead = self.instead or _instead(self.stands_for)
        return f"get it from {self.url} and put it at {self.destination}; or {instead}"


def manifest(path: Path | None = None) -> dict[str, Asset]:
    """Reads which files can be fetched, by name."""
    path = path or Path(__file__).with_name("assets.json")
    roots = {"data": data_dir(), "log": log_dir(), "logs": Path(output_folder("logs"))}
    try:
        groups = read_json(path)
        return {
            name: Asset(name, root=roots[group], **facts) for group in groups for name, facts in groups[group].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the list of downloadable files {path}: {error}") from error


def resolve(path: str | os.PathLike, assets: Mapping[str, Asset] | None = None) -> Path:
    """Finds a file: itself if it exists, else the manifest's file for it, fetched if need be.

    `path` may be absolute, relative to the current directory, relative to the data directory, or a manifest name. For
    one of our policies that is not there the authors' is taken, where they published it.
    """
    file = Path(path).expanduser()
    for candidate in _places(file):
        if os.path.isfile(candidate):
            return unchanged(candidate)
    for asset in (manifest() if assets is None else assets).values():
        if asset.is_meant_by(file):
            return fetch(asset)
    return require_file(file, f"no such file: {file}; {_instead(file)}")  # which it is not: says what it is


def _places(path: Path) -> tuple[Path, Path]:
    return path, data_file(path)


def _instead(path: Path) -> str:
    """Returns how one comes by another file like this one, going by the names of file and folder."""
    suite, folder, stem = path.parent.parent.name, path.parent.name, path.stem
    task, _, kind = folder.rpartition("-") if folder.endswith(("-img", "-ph")) else (folder, "", "")
    ways, shipped = [], SHIPPED_DATA / suite / folder
    if os.environ.get("DPPO_DATA_DIR") and (shipped / path.name).is_file():
        ways.append("take the home-made one that ships with the repository (unset DPPO_DATA_DIR)")
    elif INSTALLED and shipped.is_dir() and stem in _LEFT_OUT:
        ways.append("set DPPO_DATA_DIR to data/ of a checkout of the repository, which has a home-made one")
    if command := _pre_training(suite, task, f"{stem}_{kind}" if kind else stem):
        ways.append(f"make it with `{command}` and give base_policy_path=<its run folder>")
    elif kind == "img":
        ways.append(f"make home-made ones with `python script/dataset/render_robomimic_demos.py {task}`")
    elif stem in ("train", "val", "normalization") and suite != "furniture":  # which nothing of ours replaces
        ways.append(f"make it with `python script/dataset/convert.py SOURCE {path.parent}` of data that you have")
    return ", or ".join([*ways, "check the path, or set DPPO_DATA_DIR"])


def _pre_training(suite: str, task: str, name: str) -> str | None:
    folder = f"cfg/{suite}/pretrain/{task}"
    for stem, change in ((name, ""), (name.removesuffix("_ta1"), " horizon_steps=1")):  # "ta1": one action at a time
        if (REPOSITORY / folder / f"{stem}.yaml").is_file():
            return f"python script/run.py --config-name={stem} --config-dir={folder}{change}"
    return None


def fetch(asset: Asset) -> Path:
    """Returns the asset's path; fetches and checks it first if it is not there.

    Raises:
        UserError: it cannot be had, is not what was expected, or does not belong to the data that are here. The line
            says what can be had or made instead.
    """
    destination = asset.destination
    _require_its_statistics(asset)
    if destination.is_file():
        return unchanged(destination)
    source = os.environ.get("DPPO_ASSETS_DIR", "")
    if source and not source.startswith(("http://", "https://")):
        return _copied(source, asset)
    gdown, lock = _downloader(asset), destination.with_name(f".{destination.name}.lock")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(lock) or contextlib.nullcontext() as held:
            if held is None:
                raise UserError(f"another process is downloading {asset.name}: wait for it, then repeat the command")
            try:
                return _download(gdown, f"{source.rstrip('/')}/{asset.name}" if source else asset.url, asset)
            finally:
                lock.unlink()
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror or error}") from error


def fetch_folder(asset: Asset) -> Path:
    """Returns the path of a folder of Drive; fetches those of its files first that are not there."""
    for identity, name, _ in _listed(_downloader(asset), asset.url, asset):
        fetch(replace(asset, name=asset.name + name, url=_DRIVE + identity))
    return asset.destination


def _require_its_statistics(asset: Asset) -> None:
    """Raises UserError where the data here have statistics of their own, with which the authors' files mean nothing."""
    statistics = data_folder(asset.folder or Path(asset.name).parent) / "normalization.npz"
    if (asset.folder or asset.root == data_dir()) and statistics.is_file() and not _record(statistics).is_file():
        raise UserError(
            f"{asset.stands_for}: {_instead(asset.stands_for)}; the authors' ({asset.name}) does not fit {statistics}, "
            "which is of other data: to have all of theirs downloaded, set DPPO_DATA_DIR to an empty folder"
        )


def _copied(source: str, asset: Asset) -> Path:
    base = Path(urllib.request.url2pathname(source.removeprefix("file://"))).expanduser()
    if not base.is_dir():
        raise UserError(f"DPPO_ASSETS_DIR={source} is not a directory")
    for copy in (base / asset.name, base / Path(asset.name).name):
        if copy.is_file():
            digest = _require_right(copy, asset)
            with atomic_file(asset.destination) as target, open(copy, "rb") as file:
                shutil.copyfileobj(file, target)
            _write_record(asset.destination, digest)
            return asset.destination
    raise UserError(f"{asset.name} is not in DPPO_ASSETS_DIR={source}: {asset.cure()}")


def _downloader(asset: Asset) -> Any:
    """Returns the module gdown. Raises UserError where nothing may or can be downloaded."""
    if os.environ.get("DPPO_OFFLINE", "") not in ("", "0"):
        raise UserError(f"{asset.stands_for} is not here and DPPO_OFFLINE is set: {asset.cure()}")
    try:
        import gdown
    except ImportError:
        how = 'to have it downloaded, pip install -e ".[download]"'
        raise UserError(f"{asset.stands_for} is not here: {how}; else {asset.cure()}") from None
    return gdown


def _download(gdown: Any, url: str, asset: Asset) -> Path:
    """Fetches into `<destination>.download`, going on with what an earlier attempt left, checks and renames it."""
    destination = asset.destination
    partial = destination.with_name(destination.name + ".download")
    print(f"downloading {asset.name} from {url} to {destination}", file=sys.stderr, flush=True)
    options = {"use_cookies": False, "timeout": _TIMEOUT, "retries": _RETRIES, "progress": _limit(asset)}
    options |= {"resume": True, "quiet": not sys.stderr.isatty()}
    try:
        address = _in_folder(gdown, url, asset)
        try:
            gdown.download(address, str(partial), **options)
        except gdown.exceptions.DownloadError as error:
            if "byte range" not in str(error):
                raise
            _forget(partial)  # the server cannot go on where it stopped
            gdown.download(address, str(partial), **options)
        digest = _require_right(partial, asset)
    except UserError:
        _forget(partial)
        raise
    except (OSError, gdown.exceptions.DownloadError) as error:
        if getattr(error, "errno", None):  # the disk's; those of the network have no number
            raise
        raise UserError(f"could not download {asset.name} ({_why(error)}): {asset.cure()}") from error
    _write_record(destination, digest)
    partial.replace(destination)
    return destination


def _in_folder(gdown: Any, url: str, asset: Asset) -> str:
    """Returns the address of a file: of the one that has its name, where `url` is a folder of Drive."""
    if "/folders/" not in url:
        return url
    name = Path(asset.name).name
    for identity, path, _ in _listed(gdown, url, asset):
        if path == name:
            return _DRIVE + identity
    raise UserError(f"{url} holds no {name}: {asset.cure()}")


def _listed(gdown: Any, url: str, asset: Asset) -> Sequence[tuple[str, str, str]]:
    """Returns the files of a folder of Drive: (id, path in it, …)."""
    try:
        return gdown.download_folder(url, skip_download=True, quiet=True, use_cookies=False, timeout=_TIMEOUT)
    except (OSError, gdown.exceptions.DownloadError) as error:
        raise UserError(f"could not list {url} ({_why(error)}): {asset.cure()}") from error


def _why(error: Exception) -> str:
    return "no connection" if "Max retries exceeded" in str(error) else one_line(error)


def _limit(asset: Asset) -> Callable[[int, int | None], None]:
    most = asset.size or _MOST

    def check(done: int, total: int | None) -> None:
        if (sent := max(done, total or 0)) > most:
            raise UserError(
                f"{asset.name}: the server sends {sent} bytes, more than the {most} expected; {asset.cure()}"
            )

    return check


def _forget(partial: Path) -> None:
    for file in partial.parent.glob(glob.escape(partial.name) + "*"):
        file.unlink()


def _require_right(path: Path, asset: Asset) -> str:
    """Returns a file's sha256. Raises UserError where that, the size or the contents are not what was expected."""
    digest, size = sha256(path), path.stat().st_size
    with open(path, "rb") as file:
        beginning = file.read(64).lstrip()
    if not size or beginning.startswith(b"<"):
        wrong = "a web page came instead of the file" if size else "nothing came"
    elif asset.size not in (None, size):
        wrong = f"{size} bytes came, expected {asset.size}"
    elif asset.sha256 not in (None, digest):
        wrong = f"sha256 is {digest}, expected {asset.sha256}"
    else:
        return digest
    raise UserError(f"{asset.name}: {wrong}; {asset.cure()}")


def sha256(path: Path) -> str:
    """Returns the hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _write_record(path: Path, digest: str) -> None:
    write_bytes(_record(path), f"{digest}  {path.name}\n".encode())  # as sha256sum -c reads it


def unchanged(path: Path) -> Path:
    """Returns a path. Raises UserError where the file was downloaded and is not what came then."""
    record = _record(path)
    if record.is_file() and read_bytes(record, most=4096).split()[:1] != [sha256(path).encode()]:
        raise UserError(f"{path} is not what was downloaded: delete it, or {record} if it is meant to be another file")
    return path
