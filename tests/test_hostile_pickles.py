"""Hostile and damaged `.pt` files: refused in one line, without executing anything."""

import collections
import io
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_rl.core.errors import UserError
from diffusion_rl.interop.torch_checkpoint import read_pt
from diffusion_rl.training.checkpoint import load_checkpoint

torch = pytest.importorskip("torch", reason="the other side of these comparisons: pip install -e '.[parity]'")


class Calls:
    """Pickles as a call of `function` on `arguments`."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


class HasSetState:
    def __getstate__(self):
        return {"a": 1}

    def __setstate__(self, state):
        raise AssertionError("executed")


def archive_of(program: bytes, records=(), compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, contents in records:
            archive.writestr(f"archive/{name}", contents)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(key="0", numel=4, storage_class=b"ctorch\nFloatStorage\n", kind="storage") -> bytes:
    return b"(" + text(kind) + storage_class + text(key) + text("cpu") + b"J" + struct.pack("<i", numel) + b"tQ"


def tensor(offset=0, size=(4,), stride=(1,), body=None, function=b"ctorch._utils\n_rebuild_tensor_v2\n", **options):
    numbers = [pickle.dumps(value, 2)[2:-1] for value in (offset, size, stride)]
    return function + b"(" + (body or storage(**options)) + b"".join(numbers) + b"\x89)tR"


FOUR = [("data/0", np.arange(4, dtype=np.float32).tobytes())]
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
META = b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n"
ORDERED = b"ccollections\nOrderedDict\n"


def proto2(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    """Programs that would create `marker`, or reach for something, if anything in them were executed."""
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    system = f"(S'{touch}'\n".encode()
    quoted = text(touch)
    programs = {
        **{f"os.system, protocol {n}": pickle.dumps(Calls(os.system, touch), n) for n in range(6)},
        **{f"eval, protocol {n}": pickle.dumps({"model": Calls(eval, code)}, n) for n in range(6)},
        "exec": pickle.dumps(Calls(exec, code), 2),
        "subprocess": pickle.dumps(Calls(subprocess.Popen, ["touch", str(marker)]), 2),
        "open": pickle.dumps(Calls(open, str(marker), "w"), 2),
        "in an argument": pickle.dumps(Calls(collections.OrderedDict, [("a", Calls(os.system, touch))]), 2),
        "as a dictionary's key": pickle.dumps({Calls(os.system, touch): 1}, 2),
        "in a state": pickle.dumps(Calls(collections.OrderedDict, state={"a": Calls(os.system, touch)}), 2),
        "__setstate__": pickle.dumps(HasSetState(), 2),
        "getattr chain": proto2(
            b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(" + text("os") + b"tR" + text("system") + b"tR("
            b"" + quoted + b"tR"
        ),
        "dotted name": b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93(" + quoted + b"tR.",
        "dotted module": b"\x80\x04" + text("torch._utils") + text("torch.os.system") + b"\x93(" + quoted + b"tR.",
        "torch's loader": proto2(b"ctorch.storage\n_load_from_bytes\n(" + quoted + b"tR"),
        "torch.load": proto2(b"ctorch\nload\n(" + quoted + b"tR"),
        "numpy": pickle.dumps({"a": np.ones(2)}, 2),
        "numpy scalar": pickle.dumps(np.float64(1), 2),
        "codecs": pickle.dumps(b"bytes", 2),
        "a set": pickle.dumps({1, 2}, 2),
        "INST": system + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + quoted + b"o.",
        "OBJ of a known name": b"(" + ORDERED + b"o.",
        "NEWOBJ": proto2(ORDERED + b")\x81"),
        "NEWOBJ_EX": b"\x80\x04" + ORDERED + b")}\x92.",
        "extension": proto2(b"\x82\x01"),
        "text persistent id": b"Pos.system\n.",
        "next buffer": b"\x80\x05\x97.",
        "call of a storage class": proto2(b"ctorch\nFloatStorage\n(" + quoted + b"tR"),
        "call of a string": proto2(quoted + b")R"),
        "call of a dtype": proto2(b"ctorch\nfloat32\n)R"),
        "call without a tuple": proto2(ORDERED + b"]R"),
        "state of a function": proto2(REBUILD + b"(N}" + text("__defaults__") + b"Nstb"),
        "state of a dictionary": proto2(b"}}b"),
        "state of a tensor": proto2(tensor() + b"}b"),
        "slot state": proto2(ORDERED + b")RN}" + text("__class__") + b"Ns\x86b"),
        "item of a function": proto2(REBUILD + text("a") + b"Ns"),
        "append to a dictionary": proto2(b"}Na"),
        "a bare function": proto2(b"]" + REBUILD + b"a"),
        "a bare storage": proto2(b"}" + text("a") + storage() + b"s"),
        "a tuple nested 100,000 deep as a key": proto2(b"})" + b"\x85" * 100_000 + b"Ns"),
        "the same in an OrderedDict": proto2(ORDERED + b"])" + b"\x85" * 100_000 + b"N\x86a\x85R"),
        "another kind of persistent id": proto2(storage(kind="module")),
        "a callable as storage class": proto2(storage(storage_class=b"cos\nsystem\n")),
        "a string as storage class": proto2(storage(storage_class=text("FloatStorage"))),
        "out of bounds": proto2(tensor(size=(5,))),
        "out of bounds by offset": proto2(tensor(offset=1)),
        "out of bounds by stride": proto2(tensor(size=(2, 2), stride=(3, 1))),
        "far out of bounds": proto2(tensor(size=(2**40,))),
        "a stride that overflows": proto2(tensor(size=(2**33, 2), stride=(2**62, 1))),
        "an expansion bomb": proto2(tensor(size=(2**40,), stride=(0,))),
        "lazily conjugated": proto2(
            REBUILD + b"(" + storage() + b"K\x00K\x04\x85K\x01\x85\x89)}" + text("c") + b"NstR"
        ),
    }
    return {name: archive_of(program, FOUR) for name, program in programs.items()}


def damaged_pickles() -> dict[str, bytes]:
    """Nonsense that must end in one line too."""
    programs = {
        "empty": b"",
        "no end": b"\x80\x02}",
        "empty stack": proto2(b""),
        "two results": proto2(b"}}"),
        "stack underflow": proto2(b"s"),
        "no mark": proto2(b"u"),
        "an open mark": proto2(b"(}"),
        "odd items": proto2(b"}(NNNu"),
        "a memory that is not there": proto2(b"j" + struct.pack("<I", 2**31)),
        "an unhashable key": proto2(tensor(size=([],))),
        "negative size": proto2(tensor(size=(-1,))),
        "negative stride": proto2(tensor(stride=(-1,))),
        "negative offset": proto2(tensor(offset=-1)),
        "bool as size": proto2(tensor(size=(True,))),
        "float as size": proto2(tensor(size=(2.0,))),
        "huge number": proto2(tensor(size=(2**1000,))),
        "more sizes than strides": proto2(tensor(size=(2, 2))),
        "forty dimensions": proto2(tensor(size=(1,) * 40, stride=(1,) * 40)),
        "a size numpy cannot hold": proto2(tensor(size=(0, 2**62, 2**62), stride=(1, 1, 1))),
        "storage of another length": proto2(tensor(numel=5)),
        "storage that is not there": proto2(tensor(key="1")),
        "storage outside": proto2(tensor(key="../data.pkl")),
        "a tensor without storage": proto2(tensor(body=b"N")),
        "a parameter without tensor": proto2(b"ctorch._utils\n_rebuild_parameter\n(N\x88NtR"),
        "too few arguments": proto2(REBUILD + b")R"),
        "an unknown byte": b"\x80\x02\xff.",
        "protocol of tomorrow": b"\x80\x63\x85.",
        "a string longer than the file": proto2(b"X\xff\xff\xff\x7fabc"),
        "a string of a terabyte": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
        "bad utf-8": proto2(b"X\x01\x00\x00\x00\xff"),
        "not ascii": proto2(b"c\xff\n\xff\n"),
        "v3 without storage": proto2(
            b"ctorch._utils\n_rebuild_tensor_v3\n(NK\x00K\x04\x85K\x01\x85\x89Nctorch\nuint16\ntR"
        ),
        "a tensor without elements of an unknown type": proto2(META + b"(NK\x04\x85K\x01\x85\x89tR"),
        "a tensor without elements or size": proto2(META + b"(ctorch\nfloat32\nNN\x89tR"),
        "a tensor without elements of negative size": proto2(META + b"(ctorch\nfloat32\nJ\xff\xff\xff\xff\x85)\x89tR"),
        "v3 of an unknown type": proto2(b"ctorch._utils\n_rebuild_tensor_v3\n(NK\x00K\x04\x85K\x01\x85\x89NNtR"),
    }
    return {name: archive_of(program, FOUR) for name, program in programs.items()}


def hostile_archives(marker: Path) -> dict[str, bytes]:
    good = proto2(tensor())
    zeros = archive_of(proto2(tensor(numel=10**8)), [("data/0", bytes(4 * 10**8 // 100))], zipfile.ZIP_DEFLATED)
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a/data.pkl", good)
        archive.writestr("b/data.pkl", good)
    return {
        "bare pickle": pickle.dumps(Calls(os.system, f"touch {marker}"), 2),
        "zip bomb": zeros,
        "records over each other": overlapping(),
        "two pickles": twice.getvalue(),
        "another zip": archive_of(good).replace(b"data.pkl", b"date.pkl"),
        "TorchScript": archive_of(good, [*FOUR, ("constants.pkl", b"")]),
        "not a zip": b"hello",
        "empty": b"",
    }


def overlapping() -> bytes:
    """An archive whose directory lists one record of 1 MB under 64 names, so that it "holds" 64 MB."""
    program = b"]("
    for key in range(64):
        program += tensor(key=str(key), numel=250_000, size=(250_000,))
    payload = archive_of(proto2(program + b"e"), [("data/0", bytes(1_000_000))])
    directory = payload.index(b"PK\x01\x02")
    end = payload.rindex(b"PK\x05\x06")
    entries = payload[directory:end].split(b"PK\x01\x02")[1:]
    (data,) = (entry for entry in entries if b"archive/data/0" in entry)
    for key in range(1, 64):
        name = f"archive/data/{key}".encode()
        entries.append(data[:24] + struct.pack("<H", len(name)) + data[26:42] + name)
    listed = b"".join(b"PK\x01\x02" + entry for entry in entries)
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, len(entries), len(entries), len(listed), directory, 0)
    return payload[:directory] + listed + tail


HOSTILE = {**hostile_pickles(Path("MARKER")), **hostile_archives(Path("MARKER"))}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line_and_execute_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(HOSTILE[name])
    for read in (read_pt, load_checkpoint):
        with pytest.raises(UserError) as caught:
            read("x.pt")
        message = str(caught.value)
        allowed = ("damaged",) if name == "records over each other" else ()
        assert message.startswith("x.pt refused: ") or any(word in message for word in allowed), message
        assert "\n" not in message and len(message) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_the_hostile_files_do_harm_where_they_are_executed(tmp_path, monkeypatch):
    """The test above would prove nothing if its files were harmless to everybody."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system, protocol 2", "eval, protocol 4", "in an argument", "getattr chain", "INST"):
        with zipfile.ZipFile(io.BytesIO(HOSTILE[name])) as archive:
            pickle.loads(archive.read("archive/data.pkl"))
        Path("MARKER").unlink()


def test_the_refusal_says_what_the_pickle_wants(tmp_path):
    (tmp_path / "x.pt").write_bytes(HOSTILE["os.system, protocol 2"])
    with pytest.raises(
        UserError, match=r"refused: this pickle wants posix\.system, which has no place in a checkpoint"
    ):
        read_pt(tmp_path / "x.pt")


@pytest.mark.parametrize("name", damaged_pickles())
def test_nonsense_is_one_line(tmp_path, name):
    (tmp_path / "x.pt").write_bytes(damaged_pickles()[name])
    with pytest.raises(UserError, match=r"is damaged|refused") as caught:
        read_pt(tmp_path / "x.pt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_good_hand_made_file_reads(tmp_path):
    """So the refusals above are not refusals of the way these files are made."""
    (tmp_path / "x.pt").write_bytes(archive_of(proto2(tensor(offset=1, size=(2,), stride=(2,))), FOUR))
    assert read_pt(tmp_path / "x.pt").tolist() == [1.0, 3.0]
    big = np.arange(4, dtype=">f4").tobytes()
    (tmp_path / "x.pt").write_bytes(archive_of(proto2(tensor()), [("data/0", big), ("byteorder", b"big")]))
    assert read_pt(tmp_path / "x.pt").tolist() == [0.0, 1.0, 2.0, 3.0]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_random_programs_are_one_line_or_a_value(tmp_path_factory, program, wrapped):
    path = tmp_path_factory.getbasetemp() / "random.pt"
    path.write_bytes(archive_of(proto2(program) if wrapped else program, FOUR))
    try:
        read_pt(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_truncated_and_flipped_files_are_one_line_or_unchanged(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"itr": 3, "model": torch.nn.Linear(3, 2).state_dict()}, path)
    payload = path.read_bytes()
    good = read_pt(path)
    for length in range(0, len(payload), 5):
        path.write_bytes(payload[:length])
        with pytest.raises(UserError, match="damaged|refused"):
            read_pt(path)
    draw = np.random.default_rng(0)
    for position in range(0, len(payload), 3):
        broken = bytearray(payload)
        broken[position] ^= int(draw.integers(1, 256))
        path.write_bytes(broken)
        try:
            read = read_pt(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert repr(read) == repr(good)


def test_formats_of_other_times_name_the_cure(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before 1\.6: write it anew with torch\.save"):
        read_pt(tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"no checkpoint at .*y\.pt"):
        read_pt(tmp_path / "y.pt")
    torch.save({"a": torch.ones(2).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="_rebuild_sparse_tensor"):
        read_pt(tmp_path / "x.pt")
