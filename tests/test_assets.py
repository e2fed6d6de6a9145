"""Downloads from a local server: resumption, mirrors, checksums, offline use, and what the user is told."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from diffusion_rl.core.errors import UserError
from diffusion_rl.data import assets
from diffusion_rl.data.assets import Asset, data_dir, fetch, manifest, resolve

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves CONTENT at /file, with Range; `break_after` cuts the first answers; `requests` records the ranges."""

    def __init__(self):
        self.requests: list[str | None] = []
        self.break_after: list[int] = []
        self.ranges = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.headers.get("Range"))
                if self.path != "/file":
                    self.send_error(503 if self.path == "/busy" else 404)
                    return
                start = 0
                if outer.ranges and self.headers.get("Range"):
                    start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                if start >= len(CONTENT):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(CONTENT) - start))
                self.end_headers()
                stop = start + outer.break_after.pop(0) if outer.break_after else len(CONTENT)
                self.wfile.write(CONTENT[start:stop])

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("DPPO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("DPPO_ASSETS_DIR", raising=False)
    monkeypatch.delenv("DPPO_OFFLINE", raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def asset(*urls: str, **changes) -> Asset:
    entry = {"destination": "gym/x/train.npz", "urls": urls, "sha256": DIGEST, "size": len(CONTENT)} | changes
    return Asset(name="x", **entry)


def test_download(server, tmp_path, capsys):
    path = fetch(asset(server.url + "/file"))
    assert path == tmp_path / "data" / "gym" / "x" / "train.npz" and path.read_bytes() == CONTENT
    assert "0.3 MB of 0.3 (100%), 0 s left" in capsys.readouterr().err
    assert [p.name for p in path.parent.iterdir()] == ["train.npz"]
    assert fetch(asset()) == path and len(server.requests) == 1  # now it is here


def test_an_interrupted_download_continues(server):
    server.break_after = [100_000, 50_000]
    assert fetch(asset(server.url + "/file")).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_continues_what_an_earlier_one_left(server, tmp_path):
    partial = tmp_path / "data" / "gym" / "x" / "train.npz.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT[:7])
    assert fetch(asset(server.url + "/file")).read_bytes() == CONTENT
    assert server.requests == ["bytes=7-"]


def test_a_server_without_ranges_sends_everything_again(server):
    server.ranges, server.break_after = False, [100_000]
    assert fetch(asset(server.url + "/file", size=None)).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-"]


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_a_partial_file_that_is_too_long_is_begun_anew(server, tmp_path, size):
    partial = tmp_path / "data" / "gym" / "x" / "train.npz.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT + b"more")
    assert fetch(asset(server.url + "/file", size=size)).read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match=f"sha256 is {DIGEST}, expected 0000.*put it at .*train.npz"):
        fetch(asset(server.url + "/file", sha256="0" * 64))
    assert list((tmp_path / "data" / "gym" / "x").iterdir()) == []


def test_a_damaged_partial_file_is_not_kept(server, tmp_path):
    partial = tmp_path / "data" / "gym" / "x" / "train.npz.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 1000)
    mirrors = (server.url + "/file", server.url + "/file")  # the first continues the damage, the second starts anew
    assert fetch(asset(*mirrors)).read_bytes() == CONTENT


def test_mirrors(server, monkeypatch):
    monkeypatch.setattr(assets.time, "sleep", lambda _: None)
    urls = [server.url + "/gone", server.url + "/busy", "http://127.0.0.1:1/file", server.url + "/file"]
    assert fetch(asset(*urls)).read_bytes() == CONTENT
    assert len(server.requests) == 1 + assets._ATTEMPTS + 1


def test_all_mirrors_down_names_file_and_cure(server):
    with pytest.raises(UserError, match="could not get x .*/gone: Not Found.*put it at .*train.npz") as caught:
        fetch(asset(server.url + "/gone"))
    assert "\n" not in str(caught.value)


def test_offline(server, monkeypatch):
    monkeypatch.setenv("DPPO_OFFLINE", "1")
    with pytest.raises(UserError, match="DPPO_OFFLINE is set: get it from http.*file and put it at .*train.npz"):
        fetch(asset(server.url + "/file"))
    assert server.requests == []


@pytest.mark.parametrize("form", ["{}", "file://{}"])
@pytest.mark.parametrize("name", ["gym/x/train.npz", "train.npz"])
def test_a_local_folder_serves_instead_of_the_network(server, tmp_path, monkeypatch, form, name):
    source = tmp_path / "usb" / name
    source.parent.mkdir(parents=True)
    source.write_bytes(CONTENT)
    monkeypatch.setenv("DPPO_ASSETS_DIR", form.format(tmp_path / "usb"))
    monkeypatch.setenv("DPPO_OFFLINE", "1")
    assert fetch(asset(server.url + "/file")).read_bytes() == CONTENT
    assert server.requests == [] and source.exists()


def test_a_wrong_local_file_is_refused_and_kept(server, tmp_path, monkeypatch):
    (tmp_path / "train.npz").write_bytes(b"other")
    monkeypatch.setenv("DPPO_ASSETS_DIR", str(tmp_path))
    with pytest.raises(UserError, match="train.npz: sha256 is"):
        fetch(asset(server.url + "/file"))
    assert (tmp_path / "train.npz").exists()
    monkeypatch.setenv("DPPO_ASSETS_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is not a directory"):
        fetch(asset(server.url + "/file"))


def test_resolve(server, tmp_path, monkeypatch):
    known = {"x": asset(server.url + "/file")}
    monkeypatch.chdir(tmp_path)
    Path("here.npz").write_bytes(b"")
    assert resolve("here.npz", known) == Path("here.npz")
    for spelling in ("x", "gym/x/train.npz", tmp_path / "data" / "gym" / "x" / "train.npz"):
        assert resolve(spelling, known).read_bytes() == CONTENT
        resolve(spelling, known).unlink()
    with pytest.raises(UserError, match="no such file: .*normalization.npz.*DPPO_DATA_DIR"):
        resolve("gym/y/normalization.npz", known)
    with pytest.raises(UserError, match="no such file: missing.pt"):
        resolve("missing.pt", known)


def test_data_dir_defaults_to_the_repository(monkeypatch):
    monkeypatch.delenv("DPPO_DATA_DIR", raising=False)
    assert data_dir() == Path(__file__).resolve().parents[1] / "data"


def test_the_shipped_manifest_is_complete(tmp_path):
    for entry in manifest().values():
        assert entry.urls and len(entry.sha256) == 64 and entry.size
    (tmp_path / "m.json").write_text(json.dumps({"x": {"sha": "1"}}))
    with pytest.raises(UserError, match="cannot read the list"):
        manifest(tmp_path / "m.json")
