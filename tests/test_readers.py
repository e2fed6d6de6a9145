"""Readers of files: what is no file, or claims more than it holds, is refused before anything is read or allocated."""

import errno
import io
import json
import os
import pickle
import struct
import time
import zipfile
import zlib

import h5py
import numpy as np
import pytest

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file, read_bytes, read_json, require_file, require_writable
from diffusion_rl.core.npz import read_npy, read_npz
from diffusion_rl.core.pickles import Interpreter, Refused
from diffusion_rl.data import kuka, sources
from diffusion_rl.data import plan_windows as flat
from diffusion_rl.data.episodes import Episodes, load_episodes, load_unscaled
from diffusion_rl.data.hdf5 import open_hdf5, write_hdf5
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.data.sources import agents, d3il
from diffusion_rl.data.trajectories import TrajectoryDataset
from diffusion_rl.interop import diffuser_checkpoint
from diffusion_rl.interop.torch_checkpoint import read_pt
from diffusion_rl.training.checkpoint import checkpoint_metadata, load_checkpoint, save_checkpoint

READERS = {
    "npz": (read_npz, load_episodes, MinMaxNormalizer.from_npz, sources.load),
    "npy": (read_npy,),
    "hdf5": (sources.load, flat.read_flat),
    "pkl": (d3il.read, diffuser_checkpoint.read_config),
    "pt": (read_pt, load_checkpoint),
    "safetensors": (load_checkpoint,),
    "json": (read_json,),
}


def refused(reader, path, *words):
    with pytest.raises(UserError) as caught:
        reader(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000 and all(word in message for word in words), message


@pytest.mark.parametrize("suffix", READERS)
def test_what_is_no_file_neither_blocks_nor_fails_otherwise(suffix, tmp_path):
    pipe, folder, link = (tmp_path / f"{name}.{suffix}" for name in ("pipe", "folder", "link"))
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to("/dev/zero")
    for reader in READERS[suffix]:
        refused(reader, pipe, "is a named pipe, not a file")
        refused(reader, link, "is a device, not a file")
        if reader is not sources.load:  # a folder of Minari's
            refused(reader, folder, "is a folder, not a file")
        refused(reader, tmp_path / f"none.{suffix}", "none")
        refused(reader, tmp_path / ("x" * 300 + f".{suffix}"), "File name too long")
        for content in (b"", b"text", bytes(100), b"\xff" * 100):
            (tmp_path / f"x.{suffix}").write_bytes(content)
            refused(reader, tmp_path / f"x.{suffix}", f"x.{suffix}")
    assert checkpoint_metadata(pipe) == {}


def test_a_file_of_holes_is_not_read(tmp_path):
    with open(tmp_path / "x.npy", "wb") as file:
        file.truncate(1 << 40)
    refused(read_bytes, tmp_path / "x.npy", "claims 1099511627776 bytes, of which hardly any were ever written")


def test_json_is_a_value_or_one_line(tmp_path):
    path = tmp_path / "x.json"
    for content in (b"[" * 100_000, b"{", b"9" * 5000, b'"\xff"', b""):
        path.write_bytes(content)
        refused(read_json, path, "is no JSON, or damaged")
    path.write_text('{"a": [1, null]}')
    assert read_json(path) == {"a": [1, None]}


# ---------- npz and npy ----------


def header(shape, kind="<f4") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def write_zip(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


GOOD = {
    "states": header((4, 3)) + bytes(48),
    "actions": header((4, 2)) + bytes(32),
    "traj_lengths": header((1,), "<i8") + struct.pack("<q", 4),
}


def test_an_npz_expands_to_a_limit_that_is_said_and_other_keys_are_never_read(tmp_path):
    bomb = header((75_000_000,)) + bytes(300_000_000)
    path = write_zip(tmp_path / "x.npz", GOOD | {"unused": bomb})
    assert load_episodes(path).states.shape == (4, 3)
    refused(read_npz, path, "unused claims 300000128 bytes in a file of", "at most 100 times the file's size")
    bounds = {key: header((3,)) + bytes(12) for key in ("obs_max", "action_min", "action_max")}
    refused(MinMaxNormalizer.from_npz, write_zip(tmp_path / "n.npz", bounds | {"obs_min": bomb}), "obs_min claims")
    zeros = {"rewards": header((2_000_000,)) + bytes(8_000_000)}  # as sparse rewards are: 1000 times as large as stored
    assert not read_npz(write_zip(tmp_path / "z.npz", zeros))["rewards"].any()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (header((1 << 40,)) + bytes(16), "claims 4398046511104 bytes for its shape"),
        (header((1 << 62, 1 << 62)) + bytes(16), "bytes for its shape"),
        (header((3,)) + bytes(16), "claims 12 bytes for its shape (3,), but has 16"),
        (header((2, -2)) + bytes(16), "for its shape"),
        (header((2,), "|O") + bytes(16), "holds values of type object"),
        (header((2,), "<U2") + bytes(16), "not numbers"),
        (header((0,), "V0"), "not numbers"),
        (b"", "EOF"),
    ],
)
def test_headers_are_compared_with_what_is_there(content, problem, tmp_path):
    refused(load_episodes, write_zip(tmp_path / "x.npz", GOOD | {"states": content}), problem)
    (tmp_path / "x.npy").write_bytes(content)
    refused(read_npy, tmp_path / "x.npy", problem)
    refused(kuka.read_trajectories, tmp_path, problem)


def test_only_numpys_own_compression_is_read(tmp_path):
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refused(read_npz, write_zip(tmp_path / "x.npz", GOOD, method), "by other means than numpy's")


def test_arrays_read_as_they_were_written(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {
        "fortran": np.asfortranarray(draw.normal(size=(3, 4))),
        "big": np.arange(3, dtype=">i4"),
        "scalar": np.array(2.5),
        "none": np.zeros((0, 3), bool),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        read = read_npz(tmp_path / "x.npz")
        for key, array in arrays.items():
            np.testing.assert_array_equal(read[key], array)
            assert read[key].dtype == array.dtype and read[key].flags.writeable
        assert list(read_npz(tmp_path / "x.npz", ("big", "absent"))) == ["big"]


# ---------- HDF5 ----------


def d4rl(path, change=lambda file: None, skip=""):
    fields = {"observations": np.zeros((20, 3), "f"), "actions": np.zeros((20, 2), "f"), "rewards": np.ones(20)}
    with h5py.File(path, "w") as file:
        for name, value in (fields | {"terminals": np.arange(20) == 19, "timeouts": np.zeros(20, bool)}).items():
            if name != skip:
                file[name] = value
        change(file)
    return path


def put(name, shape, chunk=b"", **options):
    """Create a data set that is never written, but for its first chunk."""

    def change(file):
        node = file.create_dataset(name, shape, "f4", **options)
        if chunk:
            node.id.write_direct_chunk((0,) * node.ndim, chunk)

    return change


def link(name, target):
    return lambda file: file.__setitem__(name, target)


def through_another(file):
    file["x"], file["rewards"] = h5py.ExternalLink("pipe", "/"), h5py.SoftLink("x/a")


ZIPPED = {"maxshape": (None,), "compression": "gzip"}
ODD = {
    "a group": ("rewards", lambda file: file.create_group("rewards"), "rewards is no array"),
    "a type": ("rewards", link("rewards", np.dtype("f4")), "rewards is no array"),
    "a scalar": ("rewards", link("rewards", 5.0), "rewards is empty or a single value"),
    "empty": ("rewards", link("rewards", h5py.Empty("f4")), "rewards is empty"),
    "texts": ("rewards", link("rewards", np.array([b"x"] * 20)), "rewards holds values of type |S1, not numbers"),
    "records": ("rewards", link("rewards", np.zeros(20, "f4,i4")), "not numbers"),
    "two for each step": ("rewards", link("rewards", np.zeros((20, 2))), "rewards has shape [20, 2]"),
    "NaN": ("rewards", link("rewards", np.full(20, np.nan)), "rewards holds NaN or infinity (first in row 0)"),
    "a dangling link": ("rewards", link("rewards", h5py.SoftLink("/nowhere")), "missing rewards"),
    "a link to itself": ("rewards", link("rewards", h5py.SoftLink("/rewards")), "its links lead nowhere"),
    "an external link": ("rewards", link("rewards", h5py.ExternalLink("pipe", "/a")), "lies in another file: copy it"),
    "through an external link": ("rewards", through_another, "lies in another file"),
    "external storage": ("rewards", put("rewards", (20,), external=[("pipe", 0, 80)]), "lies in another file"),
    "never written": ("rewards", put("rewards", (20,)), "only 0 of its 80 bytes"),
    "in parts never written": ("rewards", put("rewards", (20,), chunks=(5,), **ZIPPED), "only 0 of its 4 parts"),
    "another compression": (
        *("rewards", lambda file: file.create_dataset("rewards", data=np.ones(20, int), scaleoffset=True)),
        "rewards is compressed by other means than gzip or lzf",
    ),
    "2^40 rows": ("rewards", put("rewards", (1 << 40,), chunks=True), "different lengths"),
    "2^40 columns": (
        *("observations", put("observations", (20, 1 << 40), chunks=True)),
        "/observations claims 87960930222080 bytes in a file of",
    ),
    "a large chunk": (
        *("rewards", put("rewards", (20,), chunks=(1 << 27,), **ZIPPED)),
        "a chunk of /rewards claims 536870912 bytes",
    ),
    "a chunk that expands": (
        *("rewards", put("rewards", (20,), zlib.compress(bytes(1 << 21)), chunks=(20,), **ZIPPED)),
        "where 80 fit",
    ),
    "a larger one": (
        *("rewards", put("rewards", (20,), zlib.compress(bytes(1 << 28)), chunks=(1 << 20,), **ZIPPED)),
        "a chunk that expands to more than its 4194304 bytes",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_hdf5_that_is_refused_before_it_is_read(name, tmp_path):
    field, change, problem = ODD[name]
    os.mkfifo(tmp_path / "pipe")
    path = d4rl(tmp_path / "x.hdf5", change, skip=field)
    for reader in READERS["hdf5"]:
        refused(reader, path, problem)


def test_virtual_data_sets_are_not_followed(tmp_path):
    layout = h5py.VirtualLayout((20,), "f4")
    layout[:] = h5py.VirtualSource("/dev/zero", "x", (20,))
    path = d4rl(tmp_path / "x.hdf5", lambda file: file.create_virtual_dataset("rewards", layout), skip="rewards")
    refused(sources.load, path, "rewards lies in another file")


def test_hdf5_reads_as_it_was_written(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {"a": draw.normal(size=(30_000, 11)).astype("f"), "zeros": np.zeros(2_000_000, bool)}
    write_hdf5(tmp_path / "x.hdf5", arrays)
    with h5py.File(tmp_path / "x.hdf5", "a") as file:
        file["group/link"] = h5py.SoftLink("/a")
        file.create_dataset("lzf", data=arrays["a"], compression="lzf")
        file.create_dataset(
            "large", data=arrays["a"], chunks=(10_000, 11), compression="gzip", shuffle=True, fletcher32=True
        )
    with open_hdf5(tmp_path / "x.hdf5") as file:
        for name, key in (("a", "a"), ("zeros", "zeros"), ("group/link", "a"), ("large", "a"), ("lzf", "a")):
            np.testing.assert_array_equal(file.array(name).read(), arrays[key])
        assert (
            "group/a" not in file
            and file.group("a") is None
            and file.names() == ["a", "group", "large", "lzf", "zeros"]
        )


def minari(folder, **changes):
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        group = file.create_group("episode_0")
        arrays = {"observations": np.zeros((6, 3)), "actions": np.zeros((5, 2)), "rewards": np.ones(5)}
        for name, value in (arrays | {"terminations": np.arange(5) == 4} | changes).items():
            group[name] = value
        file["episode_²"] = 1.0
    return folder


def test_actions_of_a_discrete_space_are_refused(tmp_path):
    assert sources.load(minari(tmp_path / "a"))[0].actions.shape == (5, 2)
    for kind in (np.int64, np.int32, np.uint8, bool):
        refused(sources.load, minari(tmp_path / "b", actions=np.ones(5, kind)), "choices of a discrete space")
    folder = minari(tmp_path / "c", actions=np.ones(5))
    (folder / "metadata.json").write_text(json.dumps({"action_space": json.dumps({"type": "Discrete", "n": 3})}))
    refused(sources.load, folder, "its actions are of a Discrete space")
    (folder / "metadata.json").write_text(json.dumps({"action_space": json.dumps({"type": "Box"})}))
    assert sources.load(folder)[0].actions.tolist() == [[1.0]] * 5


# ---------- pickles ----------


TOWER = b"\x80\x02)q\x00" + b"".join((b"h" + bytes([i])) * 3 + b"\x87q" + bytes([i + 1]) for i in range(60))
LISTS = b"\x80\x02]q\x00(" + b"N" * 90_000 + b"e" + b"".join(b"](" + b"h\x00" * 5000 + b"eq\x01" for _ in range(4))


@pytest.mark.parametrize(
    "program",
    [
        *(b"\x80\x02}r" + struct.pack("<I", index) + b"." for index in (1 << 28, (1 << 32) - 1)),
        *(TOWER + end for end in (b"}h<Ns.", b"h<.", b"]h<a.")),
        b"\x80\x02}X\x05\x00\x00\x00robot}(X\x09\x00\x00\x00des_c_pos" + TOWER[2:] + b"h<X\x05\x00\x00\x00c_posh<us.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\x04\x8b" + struct.pack("<i", 1 << 30) + b".",
        LISTS + b".",
        b"\x80\x02" + b"N" * 3_000_000 + b".",
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        pickle.dumps({2**100: 1}, 2),
        pickle.dumps({1, 2}, 4),
    ],
)
def test_small_pickles_take_little_time_and_memory(program, tmp_path):
    (tmp_path / "x.pkl").write_bytes(program)
    began = time.process_time()
    for reader in READERS["pkl"]:
        refused(reader, tmp_path / "x.pkl", "x.pkl")
    assert time.process_time() - began < 10


def test_configurations_of_very_many_values_are_refused(tmp_path):
    config = b"\x80\x02cdiffuser.a\nConfig\n)\x81}(X\x06\x00\x00\x00_classcdiffuser.b\nNet\n"
    config += b"X\x05\x00\x00\x00_dict}X\x01\x00\x00\x00a"
    (tmp_path / "x.pkl").write_bytes(config + LISTS[2:] + b"h\x01h\x01\x86sub.")
    refused(diffuser_checkpoint.read_config, tmp_path / "x.pkl", "refused")


def test_the_interpreter_makes_plain_values_and_finds_nothing():
    value = {"a": [1, (2.5, None, True), {"b": "text"}], 3: b"bytes"}
    for protocol in (3, 4, 5):
        assert Interpreter().run(pickle.dumps(value, protocol)) == value
    for thing in (print, np.float64(1), complex(1), Interpreter):
        with pytest.raises(Refused, match="which has no place here"):
            Interpreter().run(pickle.dumps(thing, 4))


# ---------- checkpoints ----------


@pytest.mark.parametrize(
    "facts",
    [
        *(
            {"kind": 5},
            {"epoch": "three"},
            {"itr": [1]},
            {"itr": True},
            {"obs_dim": 2.5},
            {"config": []},
            {"train": "x"},
        ),
        *({"config": {"train": [1]}}, {"description": {"model": 3}}, {"sampling": 1}, {"sizes": [1, 2]}, {"mode": {}}),
        *({"normalization": {"obs_min": "x"}}, {"normalization": {"obs_max": [float("nan")]}}, {"normalization": [1]}),
    ],
)
def test_facts_of_another_type_are_refused_although_their_checksum_is_right(facts, tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", {"model.a": np.ones(2)}, {"kind": "dppo", **facts})
    refused(load_checkpoint, tmp_path / "x.safetensors", "its " + next(iter(facts)))


@pytest.mark.parametrize(
    "facts", [{"aliases": 5}, {"aliases": {"model": 3}}, {"empty": {"model": {"a": 1}}}, {"keys": 4}, {"entries": []}]
)
def test_facts_on_a_pt_file_that_make_no_sense_are_refused(facts, tmp_path):
    with pytest.raises(UserError, match="make no sense"):
        save_checkpoint(tmp_path / "x.pt", {"model.network.a": np.ones(2)}, {"kind": "dppo", "reference": facts})
    assert not list(tmp_path.iterdir())


# ---------- data that do not fit ----------


def folder_of_data(folder, **changes):
    arrays = {"states": np.zeros((6, 2), "f"), "actions": np.zeros((6, 1), "f"), "traj_lengths": np.array([2, 4])}
    bounds = {"obs_min": -np.ones(2), "obs_max": np.ones(2), "action_min": -np.ones(1), "action_max": np.ones(1)}
    for name, content in (("train", arrays), ("normalization", bounds)):
        np.savez(folder / f"{name}.npz", **content | {k: v for k, v in changes.items() if k in content})
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"obs_min": np.array([np.nan, -1])}, "obs_min holds NaN or infinity"),
        ({"action_max": np.array([np.inf])}, "action_max holds NaN or infinity"),
        ({"obs_max": np.array([-2.0, 1])}, "obs_min exceeds obs_max in dimension 0"),
        ({"obs_max": np.array(1.0)}, "obs_max must be a vector"),
        ({"obs_min": np.zeros(0), "obs_max": np.zeros(0)}, "must be a vector"),
        ({"obs_min": -np.ones(3), "obs_max": np.ones(3)}, "is for obs_dim=3, but obs_dim=2 is wanted"),
        ({"states": np.full((6, 2), 30.0)}, "states must be scaled"),
    ],
)
def test_bounds_and_scales_are_checked_where_data_are_read(changes, problem, tmp_path):
    assert len(load_unscaled(folder_of_data(tmp_path)).states) == 6
    refused(load_unscaled, folder_of_data(tmp_path, **changes), problem)
    if "states" not in changes and "is for" not in problem:
        refused(MinMaxNormalizer.from_npz, tmp_path / "normalization.npz", problem)


def test_values_need_rewards_and_episodes_without_a_window_are_said(tmp_path, caplog):
    rows = np.linspace(-1, 1, 9)[:, None]
    episodes = Episodes(rows, rows, np.array([1, 6, 2]))
    with pytest.raises(UserError, match="no rewards in it, so no values can be learned"):
        TrajectoryDataset(episodes, 2, discount=0.9)
    with pytest.raises(UserError, match="no rewards in it"):
        flat.flat_of(episodes)
    assert not caplog.records
    TrajectoryDataset(episodes, 4, use_padding=False)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 episodes have no window of 4 steps and are left out"
    ]


def test_names_of_data_sets_are_no_paths(tmp_path):
    for name in ("../x-y", "a/b-c", "..-x", "x-..", "/x-y"):
        with pytest.raises(UserError, match="not a path|is no folder"):
            agents.load("mpe", name, str(tmp_path), 25)


# ---------- writing ----------


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*make room or choose another folder"):
        write_hdf5(tmp_path / "x.hdf5", {"a": np.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "x", "/proc/none/x", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot write"):
            require_writable(path)
    require_writable(tmp_path / "new" / "x")
    assert not list((tmp_path / "new").iterdir())
    with atomic_file(tmp_path / "new" / "x") as file:
        file.write(b"1")
    assert require_file(tmp_path / "new" / "x").read_bytes() == b"1"
