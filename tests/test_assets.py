"""Downloads from a local server: what a server can do wrong, offline use, and what the user is told."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from diffusion_rl.config.compose import compose_job
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import lock_file
from diffusion_rl.data import assets, locate
from diffusion_rl.data.assets import Asset, data_dir, fetch, fetch_folder, manifest, resolve
from diffusion_rl.data.normalizers import read_bounds

REPOSITORY = Path(__file__).resolve().parents[1]
CONTENT = np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8).tobytes()
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = "gym/x/train.npz"


class Server:
    """Serves `files` by path, with ranges; `requests` records them.

    break_after: after how many bytes each of the next answers ends. announced: a length that is not the file's.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {"/file": CONTENT, f"/{NAME}": CONTENT, "/page": b"<html>quota</html>"}
        self.requests: list[str | None] = []
        self.break_after: list[int] = []
        self.announced: int | None = None
        self.ranges = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.headers.get("Range"))
                if self.path not in outer.files:
                    return self.send_error(404)
                content, start = outer.files[self.path], 0
                if outer.ranges and self.headers.get("Range"):
                    start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                    if start >= len(content):
                        return self.send_error(416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(outer.announced or len(content) - start))
                self.end_headers()
                stop = start + outer.break_after.pop(0) if outer.break_after else len(content)
                self.wfile.write(content[start:stop])

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    gdown = pytest.importorskip("gdown", reason='pip install -e ".[download]"')
    monkeypatch.setattr(sys.modules[gdown.download.__module__], "_wait_or_cancel", lambda **_: None)  # between retries
    monkeypatch.setenv("DPPO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DPPO_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.delenv("DPPO_ASSETS_DIR", raising=False)
    monkeypatch.delenv("DPPO_OFFLINE", raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def asset(url: str = "http://127.0.0.1:1/file", **changes) -> Asset:
    return Asset(**({"name": NAME, "url": url, "root": data_dir(), "sha256": DIGEST, "size": len(CONTENT)} | changes))


def left(server_files: Path) -> list[str]:
    return sorted(path.name for path in server_files.iterdir())


@pytest.mark.parametrize("known", [{}, {"sha256": None}, {"size": None, "sha256": None}])
def test_download(server, tmp_path, known):
    path = fetch(asset(server.url + "/file", **known))
    assert path == tmp_path / "data" / NAME and path.read_bytes() == CONTENT
    assert left(path.parent) == ["train.npz", "train.npz.sha256"]
    assert (path.parent / "train.npz.sha256").read_text() == f"{DIGEST}  train.npz\n"
    assert fetch(asset()) == path and len(server.requests) == 1  # now it is here


def test_a_file_that_changes_afterwards_is_noticed(server):
    path = fetch(asset(server.url + "/file"))
    path.write_bytes(CONTENT[:-1])
    for find in (lambda: resolve(path), lambda: fetch(asset())):
        with pytest.raises(UserError, match="train.npz is not what was downloaded: delete it"):
            find()


def test_a_connection_that_breaks_is_continued(server):
    server.break_after = [600_000, 700_000]  # gdown keeps whole pieces of 512 KiB
    assert fetch(asset(server.url + "/file")).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=524288-", "bytes=1048576-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_later_run_continues_what_an_earlier_one_left(server, tmp_path, ranges):
    server.break_after = [600_000] + [1000] * assets._RETRIES
    with pytest.raises(UserError, match="could not download gym/x/train.npz .*incomplete: received 524288 bytes"):
        fetch(asset(server.url + "/file"))
    assert not (tmp_path / "data" / NAME).exists()
    server.ranges = ranges  # without them the server sends all of it again
    server.requests.clear()
    assert fetch(asset(server.url + "/file")).read_bytes() == CONTENT
    assert "bytes=524288-" in server.requests and len(left(tmp_path / "data/gym/x")) == 2


def test_a_whole_file_under_its_temporary_name_is_taken(server, tmp_path):
    partial = tmp_path / "data" / (NAME + ".download")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT)
    assert fetch(asset(server.url + "/file")).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "changes, path, message",
    [
        ({"sha256": "0" * 64}, "/file", f"sha256 is {DIGEST}, expected 0000"),
        ({"size": 1_999_999, "sha256": None}, "/file", "the server sends 2000000 bytes, more than the 1999999"),
        ({"size": 2_000_001, "sha256": None}, "/file", "2000000 bytes came, expected 2000001"),
        ({"size": None, "sha256": None}, "/page", "a web page came instead of the file"),
        ({}, "/gone", "404 Client Error"),
        ({"url": "http://127.0.0.1:1/file"}, "", "no connection"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_cure_and_leaves_nothing(server, tmp_path, changes, path, message):
    with pytest.raises(UserError, match=f"{message}.*(put it at .*train.npz|expected)") as caught:
        fetch(asset(**({"url": server.url + path} | changes)))
    assert "\n" not in str(caught.value) and left(tmp_path / "data/gym/x") == []


@pytest.mark.parametrize(
    "announced, message", [(4_000_000, "could not download"), (1 << 40, "more than the"), (7, "7 bytes came")]
)
def test_a_server_that_lies_about_the_size(server, tmp_path, announced, message):
    server.announced = announced
    with pytest.raises(UserError, match=message):
        fetch(asset(server.url + "/file", sha256=None, size=None if announced == 4_000_000 else len(CONTENT)))
    assert not (tmp_path / "data" / NAME).exists()


def test_one_process_at_a_time(server, tmp_path):
    (tmp_path / "data/gym/x").mkdir(parents=True)
    lock = tmp_path / "data/gym/x/.train.npz.lock"
    with lock_file(lock), pytest.raises(UserError, match="another process is downloading gym/x/train.npz"):
        fetch(asset(server.url + "/file"))


def test_a_file_of_a_folder_of_drive(server, monkeypatch):
    import gdown

    listing = [("a" * 30, "val.npz", ""), ("b" * 30, "train.npz", ""), ("c" * 30, "more/train.npz", "")]
    monkeypatch.setattr(gdown, "download_folder", lambda url, **_: listing)
    monkeypatch.setattr(assets, "_DRIVE", server.url + "/")
    server.files["/" + "b" * 30] = CONTENT
    assert fetch(asset("https://drive.google.com/drive/folders/x")).read_bytes() == CONTENT
    server.files.update({f"/{identity}": identity.encode() for identity, *_ in listing})
    folder = Asset("all/", "https://drive.google.com/drive/folders/x", data_dir())
    assert (fetch_folder(folder) / "more/train.npz").read_bytes() == b"c" * 30
    with pytest.raises(UserError, match="folders/x holds no normalization.npz: get it from"):
        fetch(asset("https://drive.google.com/drive/folders/x", name="gym/x/normalization.npz"))


def test_offline(server, monkeypatch):
    monkeypatch.setenv("DPPO_OFFLINE", "1")
    with pytest.raises(
        UserError, match="DPPO_OFFLINE is set: get it from http.*file and put it at .*; or make it with"
    ):
        fetch(asset(server.url + "/file"))
    assert server.requests == []


def test_without_the_downloader(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[download\]"; else get it from'):
        fetch(asset(server.url + "/file"))


@pytest.mark.parametrize("form", ["{}", "file://{}"])
@pytest.mark.parametrize("name", [NAME, "train.npz"])
def test_a_local_folder_serves_instead_of_the_network(server, tmp_path, monkeypatch, form, name):
    source = tmp_path / "usb" / name
    source.parent.mkdir(parents=True)
    source.write_bytes(CONTENT)
    monkeypatch.setenv("DPPO_ASSETS_DIR", form.format(tmp_path / "usb"))
    monkeypatch.setenv("DPPO_OFFLINE", "1")
    assert fetch(asset(server.url + "/file")).read_bytes() == CONTENT
    assert server.requests == [] and source.exists()


def test_another_server_serves_instead(server, monkeypatch):
    monkeypatch.setenv("DPPO_ASSETS_DIR", server.url)
    assert fetch(asset()).read_bytes() == CONTENT


def test_a_wrong_local_file_is_refused_and_kept(server, tmp_path, monkeypatch):
    (tmp_path / "train.npz").write_bytes(b"other")
    monkeypatch.setenv("DPPO_ASSETS_DIR", str(tmp_path))
    with pytest.raises(UserError, match="train.npz: 5 bytes came"):
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
    for spelling in (NAME, tmp_path / "data" / NAME):
        assert resolve(spelling, known).read_bytes() == CONTENT
        resolve(spelling, known).unlink()
    with pytest.raises(UserError, match="no such file: .*normalization.npz; make it with .*convert.py SOURCE gym/y"):
        resolve("gym/y/normalization.npz", known)
    with pytest.raises(UserError, match="no such file: missing.pt; check the path, or set DPPO_DATA_DIR"):
        resolve("missing.pt", known)


RUN = "gym-pretrain/hopper-medium-v2_pre_diffusion_mlp_ta4_td20/2024-06-12_23-10-05/checkpoint/state_3000.pt"


@pytest.mark.parametrize(
    "asked", ["{data}/gym/hopper-medium-v2/pre_diffusion_mlp.safetensors", "{log}/" + RUN, "/x/" + RUN]
)
def test_the_authors_policy_and_its_statistics(server, tmp_path, monkeypatch, asked):
    """In an empty data directory all is the authors'; beside statistics of other data their policy is refused."""
    monkeypatch.setenv("DPPO_ASSETS_DIR", server.url)
    asked = asked.format(data=tmp_path / "data", log=tmp_path / "log")
    statistics = "gym/hopper-medium-v2/normalization.npz"
    bounds = io.BytesIO()
    np.savez(bounds, obs_min=np.zeros(1), obs_max=np.ones(1), action_min=np.zeros(1), action_max=np.ones(1))
    server.files |= {"/" + RUN: CONTENT, "/" + statistics: bounds.getvalue()}
    assert resolve(asked) == tmp_path / "log" / RUN
    assert read_bounds(tmp_path / "data" / statistics)["obs_max"] == [1.0]
    assert resolve(asked).read_bytes() == CONTENT
    (tmp_path / "data" / (statistics + ".sha256")).unlink()
    if "{" not in asked and not Path(asked).is_file():
        with pytest.raises(UserError, match="does not fit .*normalization.npz.*DPPO_DATA_DIR to an empty folder"):
            resolve(asked)


def test_d4rls_files(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DPPO_ASSETS_DIR", server.url)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    server.files["/hopper_random-v2.hdf5"] = CONTENT
    assert locate.find_data("hopper-random-v2").path == tmp_path / "d4rl/hopper_random-v2.hdf5"
    assert locate.find_data("hopper-random-v2").path.read_bytes() == CONTENT
    with pytest.raises(UserError, match="404.*make_gym_data.py walker2d --flavour expert"):
        locate.find_data("walker2d-expert-v2")


def test_data_dir_defaults_to_the_repository(monkeypatch):
    monkeypatch.delenv("DPPO_DATA_DIR", raising=False)
    assert data_dir() == REPOSITORY / "data"


def test_the_shipped_list(tmp_path):
    known = manifest().values()
    ids = [entry.url.rpartition("=")[2] for entry in known if "folders" not in entry.url]
    assert len(ids) == len(set(ids)) and all(len(identity) == 33 for identity in ids)
    stands_for = [entry.stands_for for entry in known]
    assert len(stands_for) == len(set(stands_for))
    (tmp_path / "m.json").write_text(json.dumps({"data": {"x": {"sha": "1"}}}))
    with pytest.raises(UserError, match="cannot read the list"):
        manifest(tmp_path / "m.json")


def configurations(stage: str) -> list[str]:
    folders = (path for path in REPOSITORY.glob(f"cfg/*/{stage}/*/*.yaml"))
    return sorted(str(path.relative_to(REPOSITORY / "cfg").with_suffix("")) for path in folders)


@pytest.mark.slow
def test_every_base_policy_can_be_had(monkeypatch, tmp_path):
    """Where a configuration's policy is not there, the line names a configuration that makes it."""
    monkeypatch.setenv("DPPO_DATA_DIR", str(tmp_path / "data"))
    policies = set()
    for name in configurations("finetune") + configurations("eval"):
        try:
            policies.add(compose_job(name, []).get("base_policy_path"))
        except UserError:
            continue  # it has none of its own
    for policy in filter(None, policies):
        with pytest.raises(UserError) as caught:
            resolve(policy)
        words = str(caught.value).replace("`", " ").split()
        name = next(w for w in words if w.startswith("--config-name=")).partition("=")[2]
        folder = next(w for w in words if w.startswith("--config-dir=")).partition("=")[2]
        assert (REPOSITORY / folder / f"{name}.yaml").is_file(), caught.value
        assert "base_policy_path=" in str(caught.value)


def test_download_pretrained(server, tmp_path):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("pretrained/hopper-medium-v2/values/state_0.pt")
        member.size = len(CONTENT)
        tar.addfile(member, io.BytesIO(CONTENT))
    server.files["/pretrained.tar"] = archive.getvalue()
    command = ["sh", str(REPOSITORY / "scripts/download_pretrained.sh"), str(tmp_path / "logs")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "DPPO_ASSETS_DIR": server.url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs/pretrained/hopper-medium-v2/values/state_0.pt").read_bytes() == CONTENT
    assert left(tmp_path / "logs") == ["pretrained"] and "--logbase" in done.stdout
    server.files.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: could not download pretrained.tar (404"
    )
