"""Checkpoints: exact round trips, and every fault provoked for real."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import diffusion_rl
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    require_kind,
    save_checkpoint,
)

CODE = str(Path(diffusion_rl.__file__).parent.parent)
DTYPES = [
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "complex64"),
]


def run_python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": CODE},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", [*map(np.dtype, DTYPES), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_every_type_and_shape_comes_back_exactly(tmp_path, dtype):
    values = (np.random.default_rng(0).standard_normal((4, 5)) * 100).astype(dtype)
    tensors = {
        "zero-d": values[0, 0:1].reshape(()),
        "empty": np.zeros((0, 3), dtype),
        "transposed": values.T,
        "strided": values[::2, 1::3],
        "a plain one": values,
    }
    save_checkpoint(tmp_path / "state_1.safetensors", tensors, {})
    loaded = load_checkpoint(tmp_path / "state_1.safetensors").tensors
    assert list(loaded) == list(tensors)
    for name, value in tensors.items():
        assert same(loaded[name], value), name
        assert loaded[name].flags.writeable


def test_the_same_contents_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / f"{name}.safetensors", {"y": np.ones(3), "x": np.zeros(2, "i1")}, {"b": 1, "a": [2]})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_bits_of_special_floats_survive(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x7F800000, 1], np.uint32)  # NaN payloads, -0, …
    save_checkpoint(tmp_path / "state_1.safetensors", {"x": bits.view(np.float32)}, {})
    assert same(load_checkpoint(tmp_path / "state_1.safetensors").tensors["x"].view(np.uint32), bits)


def test_big_endian_arrays_keep_their_values(tmp_path):
    save_checkpoint(tmp_path / "state_1.safetensors", {"x": np.arange(5, dtype=">f8")}, {})
    assert load_checkpoint(tmp_path / "state_1.safetensors").tensors["x"].tolist() == [0, 1, 2, 3, 4]


def test_metadata_come_back(tmp_path):
    noise = NoiseSource(3)
    noise.normal((5,))
    metadata = {
        "kind": "dppo",
        "config": {"a": [1, None, True], "path": Path("x/y"), "text": 'é "quoted"\n'},
        "numbers": (np.float32(0.1), np.int64(7), np.arange(3.0), 2**64 - 1, 0.1),
        "odd": [float("inf"), -float("inf"), float("nan")],
        "noise": noise.state(),
    }
    save_checkpoint(tmp_path / "state_1.safetensors", {}, metadata)
    loaded = load_checkpoint(tmp_path / "state_1.safetensors").metadata
    assert loaded["format"] == 1
    assert loaded["config"] == {"a": [1, None, True], "path": "x/y", "text": 'é "quoted"\n'}
    assert loaded["numbers"] == [float(np.float32(0.1)), 7, [0.0, 1.0, 2.0], 2**64 - 1, 0.1]
    assert loaded["odd"][:2] == [float("inf"), -float("inf")] and np.isnan(loaded["odd"][2])
    restored = NoiseSource(0)
    restored.restore(loaded["noise"])
    assert same(restored.normal((9,)), noise.normal((9,)))


@pytest.mark.parametrize(("value", "place"), [({1: 2}, "metadata.a.b"), (object(), r"metadata.a.b is a object")])
def test_metadata_that_json_would_change_are_named(tmp_path, value, place):
    with pytest.raises(TypeError, match=place):
        save_checkpoint(tmp_path / "state_1.safetensors", {}, {"a": {"b": value}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tensor", [np.array(["text"]), np.array([None]), np.ones(2, "complex128")], ids=str)
def test_tensor_types_that_cannot_be_held_are_named(tmp_path, tensor):
    with pytest.raises(UserError, match="cannot hold the tensor 'model.x' of type"):
        save_checkpoint(tmp_path / "state_1.safetensors", {"model.x": tensor}, {})


def test_select_and_require_kind():
    checkpoint = Checkpoint({"model.a": np.ones(2), "ema.a": np.zeros(2)}, {"kind": "diffusion_policy"})
    assert list(checkpoint.select("ema.")) == ["a"] and checkpoint.select("ema.")["a"].tolist() == [0, 0]
    require_kind(checkpoint, ("dppo", "diffusion_policy"), "x.pt")
    with pytest.raises(UserError, match='^x.pt is a checkpoint of kind "diffusion_policy"; needed here: dppo or sac$'):
        require_kind(checkpoint, ["dppo", "sac"], "x.pt")
    with pytest.raises(UserError, match='kind "unknown"; needed here: dppo$'):
        require_kind(Checkpoint({}, {}), "dppo", "x.pt")


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A small checkpoint: (path, its bytes, its tensors)."""
    path = tmp_path / "100%s{}" / "state_5.safetensors"  # the folder's name must not trip the messages
    tensors = {"model.a": np.arange(6, dtype=np.float32).reshape(2, 3), "train.b": np.array([True, False])}
    save_checkpoint(path, tensors, {"kind": "dppo", "itr": 5})
    return path, path.read_bytes(), tensors


def test_truncated_at_every_byte(small):
    path, payload, _ = small
    for length in range(len(payload)):
        path.write_bytes(payload[:length])
        with pytest.raises(UserError, match="damaged") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_each_byte_flipped_is_noticed_or_harmless(small):
    path, payload, tensors = small
    draw = random.Random(0)
    harmless = 0
    for position in range(len(payload)):
        broken = bytearray(payload)
        broken[position] ^= draw.randrange(1, 256)
        path.write_bytes(broken)
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:  # a blank of the header became another blank
            harmless += 1
            assert checkpoint.metadata == {"format": 1, "kind": "dppo", "itr": 5}
            assert all(same(checkpoint.tensors[name], tensors[name]) for name in tensors)
    assert harmless < 10


def test_appended_bytes_and_rubbish_are_noticed(small):
    path, payload, _ = small
    header = b'{"a":' * 100_000
    for contents in (payload + b"\0", b"", b"\xff" * 100, b"{}", len(header).to_bytes(8, "little") + header):
        path.write_bytes(contents)
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)


def test_foreign_newer_missing_and_misnamed_files(tmp_path):
    import safetensors.numpy

    safetensors.numpy.save_file({"a": np.ones(2)}, str(tmp_path / "foreign.safetensors"))
    with pytest.raises(UserError, match="no checkpoint of this package"):
        load_checkpoint(tmp_path / "foreign.safetensors")
    save_checkpoint(tmp_path / "newer.safetensors", {}, {"format": 2})
    with pytest.raises(UserError, match="format 2, newer"):
        load_checkpoint(tmp_path / "newer.safetensors")
    with pytest.raises(UserError, match="no checkpoint at .*gone.safetensors"):
        load_checkpoint(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match=r"called \*.safetensors"):
        load_checkpoint(tmp_path / "x.h5")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder, not a file"):
        load_checkpoint(tmp_path / "folder.safetensors")
    with pytest.raises(UserError, match="Is a directory"):
        save_checkpoint(tmp_path / "folder.safetensors", {}, {})
    assert not list(tmp_path.glob(".*"))


def test_latest_is_by_number_and_skips_the_damaged_with_one_warning(tmp_path, caplog):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    for n in (2, 10, 9, 11, 100):
        save_checkpoint(tmp_path / f"state_{n}.safetensors", {"x": np.full(3, n)}, {"itr": n})
    save_checkpoint(tmp_path / "best_500.safetensors", {}, {})
    (tmp_path / ".state_900.safetensors.writing-1-0").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == tmp_path / "state_100.safetensors"
    assert not caplog.records
    for n in (100, 11):
        os.truncate(tmp_path / f"state_{n}.safetensors", 150)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(str(tmp_path)) == tmp_path / "state_10.safetensors"
    (record,) = caplog.records
    assert "state_100" in record.getMessage() and "state_11" in record.getMessage()
    assert "\n" not in record.getMessage()
    for n in (2, 9, 10):
        os.truncate(tmp_path / f"state_{n}.safetensors", 0)
    assert latest_checkpoint(tmp_path) is None


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True, capture_output=True, timeout=10
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root; the limit on file sizes below is the same fault without it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=10)


def folder_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_is_one_line_and_loses_nothing(tiny_disk):
    save_checkpoint(tiny_disk / "state_2.safetensors", {"model.x": np.ones(50_000)}, {"itr": 1})
    before = folder_contents(tiny_disk)
    for name in ("state_2.safetensors", "state_2.pt"):
        with pytest.raises(UserError, match="No space left on device .*MB free there.*; make room") as caught:
            save_checkpoint(tiny_disk / name, {"model.x": np.ones(200_000)}, {"itr": 2})
        assert "\n" not in str(caught.value)
        assert folder_contents(tiny_disk) == before
    save_checkpoint(tiny_disk / "state_3.safetensors", {"x": np.ones(50_000)}, {"itr": 3})  # and what fits, fits


SAVE_UNDER_A_LIMIT = """
import resource, sys
import numpy as np
from diffusion_rl.core.errors import UserError
from diffusion_rl.training.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    save_checkpoint(sys.argv[1] + "/state_2.safetensors", {"x": np.ones(200_000)}, {"itr": 2})
except UserError as error:
    print(error)
"""


def test_a_limit_on_file_sizes_is_one_line_and_loses_nothing(tmp_path):
    save_checkpoint(tmp_path / "state_2.safetensors", {"x": np.ones(50_000)}, {"itr": 1})
    before = folder_contents(tmp_path)
    limited = run_python(SAVE_UNDER_A_LIMIT, tmp_path)
    assert "File too large" in limited.stdout and limited.stdout.count("\n") == 1, limited.stderr
    assert folder_contents(tmp_path) == before


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/state_1.safetensors: "):
        save_checkpoint(tmp_path / "file" / "state_1.safetensors", {}, {})


SAVE_FOREVER = """
import sys
import numpy as np
from diffusion_rl.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
path = latest_checkpoint(sys.argv[1])
itr = load_checkpoint(path).metadata["itr"] if path else 0
print("saving", flush=True)
while True:
    itr += 1
    # Both patterns of a run: a new name each time, and the same name again and again.
    for name in (f"state_{itr % 4}", "state_1000000"):
        save_checkpoint(f"{sys.argv[1]}/{name}.safetensors", {"x": np.full(500_000, itr)}, {"itr": itr})
"""


def test_killed_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    draw = random.Random(time.time_ns())
    reached = 0
    leftovers = 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": CODE},
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(draw.uniform(0.02, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        process.stdout.close()
        leftovers += len(list(tmp_path.glob(".*")))
        for path in tmp_path.glob("state_*"):  # not only the latest: each of them is whole
            checkpoint = load_checkpoint(path)
            assert np.all(checkpoint.tensors["x"] == checkpoint.metadata["itr"])
        if path := latest_checkpoint(tmp_path):
            assert load_checkpoint(path).metadata["itr"] >= reached
            reached = load_checkpoint(path).metadata["itr"]
    assert reached > 0
    save_checkpoint(tmp_path / "state_1.safetensors", {}, {})
    assert not list(tmp_path.glob(".*")), f"{leftovers} temporary files were left by the kills, and not all removed"


def test_only_abandoned_temporary_files_are_removed(tmp_path):
    abandoned = tmp_path / ".state_7.safetensors.writing-1-0"  # process 1 lives, but does not hold it
    abandoned.write_bytes(b"half")
    with atomic_file(tmp_path / "a") as file:
        file.write(b"one")
        save_checkpoint(tmp_path / "state_1.safetensors", {}, {})
        with atomic_file(tmp_path / "a") as second:
            second.write(b"two")
        assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").read_bytes() == b"one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "state_1.safetensors"]


def test_an_interrupted_block_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_the_umask_decides_on_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "state_1.safetensors", {}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "state_1.safetensors").stat().st_mode & 0o777 == 0o640


def test_neither_tensorflow_nor_torch_is_imported():
    program = (
        "import sys, diffusion_rl.training.checkpoint, diffusion_rl.interop.torch_checkpoint, "
        "diffusion_rl.interop.reference_checkpoint; print({'tensorflow', 'torch', 'tf_keras'} & set(sys.modules))"
    )
    assert run_python(program).stdout == "set()\n"
