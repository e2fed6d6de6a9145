"""`.pt` files: bit-exact both ways, and hostile ones refused without executing anything."""

import collections
import io
import math
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion_rl
from diffusion_rl.core.errors import UserError
from diffusion_rl.interop.reference_checkpoint import from_reference, to_reference
from diffusion_rl.interop.torch_checkpoint import read_pt, write_pt
from diffusion_rl.loops.run_state import load_checkpoint, save_checkpoint

torch = pytest.importorskip("torch", reason="the other side of these comparisons: pip install -e '.[parity]'")

CODE = Path(diffusion_rl.__file__).parent.parent
SCRIPT = CODE.parent / "script" / "convert_checkpoint.py"
DTYPES = [
    *(torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


def bits(tensor) -> bytes:
    """The raw bytes of a tensor or an array, in C order."""
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def dtype_name(value) -> str:
    return value.dtype.name if isinstance(value, np.ndarray) else str(value.dtype).removeprefix("torch.")


def same(a, b) -> bool:
    return dtype_name(a) == dtype_name(b) and tuple(a.shape) == tuple(b.shape) and bits(a) == bits(b)


def random_tensor(dtype, shape, seed=0):
    """Random bits (so NaN payloads and subnormals too), but proper bools."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (math.prod(shape) * size,), dtype=torch.uint8, generator=generator)
    return (raw % 2).bool().reshape(shape) if dtype == torch.bool else raw.view(dtype).reshape(shape)


# --- bit-exact both ways ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_both_ways(tmp_path, dtype):
    base = random_tensor(dtype, (4, 6))
    tensors = {
        "plain": base,
        "transposed": base.T,
        "view": base[1:3, 2::3],
        "offset": base.flatten()[5:],
        "zero-d": base[2, 3],
        "empty": base[:, :0],
        "empty too": torch.empty((0,), dtype=dtype),
        "one": base[:1, :1],
        "expanded": base[:1].expand(3, 6),
    }
    torch.save(tensors, tmp_path / "theirs.pt")
    read = read_pt(tmp_path / "theirs.pt")
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert same(read[name], tensor), name
        assert read[name].flags.writeable and read[name].flags.c_contiguous

    write_pt(tmp_path / "ours.pt", read)
    for options in ({}, {"mmap": True}):
        back = torch.load(tmp_path / "ours.pt", weights_only=True, **options)
        assert list(back) == list(tensors)
        assert all(same(back[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=5),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
)
def test_drawn_shapes_and_views_both_ways(tmp_path_factory, dtype, shape, order, step):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    tensor = random_tensor(dtype, shape).permute(axes)[(slice(None, None, step),) * len(shape)]
    path = tmp_path_factory.mktemp("drawn") / "x.pt"
    torch.save({"x": tensor}, path)
    read = read_pt(path)
    assert same(read["x"], tensor)
    write_pt(path, read)
    assert same(torch.load(path, weights_only=True)["x"], tensor)


def test_plain_values_both_ways(tmp_path):
    values = {
        "ints": [0, -1, 255, 256, 2**31 - 1, -(2**31), 2**31, 2**70, -(2**70)],
        "floats": (1.5, -0.0, float("inf"), 1e-320),
        "rest": [None, True, False, "", "é😀\n", "\ud800"],
        "nested": {"a": {"b": [{"c": (1, (2, ()))}]}, 1: "one", None: "none", 2.5: "float", False: 1},
        "same": ["text", "text"],
        "ordered": collections.OrderedDict(z=1, a=2),
        "long": list(range(3000)),
    }
    for protocol in (2, 3, 4, 5):
        torch.save(values, tmp_path / "theirs.pt", pickle_protocol=protocol)
        assert repr(read_pt(tmp_path / "theirs.pt")) == repr(values)
    write_pt(tmp_path / "ours.pt", values)
    back = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert repr(back) == repr(values) == repr(read_pt(tmp_path / "ours.pt"))


def test_torch_values_become_plain_ones(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(
        {
            "parameter": parameter,
            "leaf": torch.ones(1, requires_grad=True),
            "list": [parameter.data],
            "state": model.state_dict(),  # an OrderedDict with an attribute
            "size": torch.Size([2, 3]),
            "dtype": torch.float16,
            "device": torch.device("cpu"),
        },
        tmp_path / "x.pt",
    )
    read = read_pt(tmp_path / "x.pt")
    assert same(read["parameter"], parameter) and same(read["leaf"], torch.ones(1))
    assert read["list"][0] is read["parameter"]
    assert (read["size"], read["dtype"], read["device"]) == ((2, 3), "torch.float16", "cpu")
    assert isinstance(read["state"], collections.OrderedDict)
    assert list(read["state"]) == list(model.state_dict())
    assert all(same(read["state"][name], value) for name, value in model.state_dict().items())


def test_shared_arrays_are_stored_once_and_load_shared(tmp_path):
    array = np.random.default_rng(0).standard_normal((100, 100))
    write_pt(tmp_path / "x.pt", {"a": array, "b": array, "c": array.copy()})
    assert 2 * array.nbytes < (tmp_path / "x.pt").stat().st_size < 2.1 * array.nbytes
    back = torch.load(tmp_path / "x.pt", weights_only=True)
    assert back["a"].data_ptr() == back["b"].data_ptr() != back["c"].data_ptr()
    read = read_pt(tmp_path / "x.pt")
    assert read["a"] is read["b"] is not read["c"]


def test_non_contiguous_and_big_endian_arrays_are_written_right(tmp_path):
    array = np.arange(24.0).reshape(4, 6)
    arrays = {"t": array.T, "s": array[::2, ::-3], "be": array.astype(">f8"), "scalar": np.float32(0.1)}
    write_pt(tmp_path / "x.pt", arrays)
    back = torch.load(tmp_path / "x.pt", weights_only=True)
    for name in ("t", "s", "be"):
        assert np.array_equal(back[name].numpy(), arrays[name])
    assert back["scalar"] == float(np.float32(0.1))


def test_the_same_data_give_the_same_bytes_aligned_as_torch_has_them(tmp_path):
    data = {"a": np.ones((3, 3)), "b": [1, np.zeros(5, np.int8)]}
    write_pt(tmp_path / "x.pt", data)
    write_pt(tmp_path / "y.pt", data)
    contents = (tmp_path / "x.pt").read_bytes()
    assert contents == (tmp_path / "y.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            name, extra = struct.unpack("<HH", contents[info.header_offset + 26 : info.header_offset + 30])
            assert (info.header_offset + 30 + name + extra) % 64 == 0


@pytest.mark.parametrize(
    "value", [b"bytes", {1, 2}, object(), np.array(["text"]), np.array([None]), np.ones(2, ">c32")], ids=repr
)
def test_what_cannot_be_written_is_named(tmp_path, value):
    with pytest.raises(UserError, match="cannot hold"):
        write_pt(tmp_path / "x.pt", {"a": [value]})
    loop = []
    loop.append(loop)
    with pytest.raises(UserError, match="within themselves"):
        write_pt(tmp_path / "x.pt", loop)
    assert not list(tmp_path.iterdir())


# --- hostile and damaged files ---------------------------------------------------------------------------------------


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
    torch.save({"a": torch.ones(2, device="meta")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="_rebuild_meta_tensor_no_storage"):
        read_pt(tmp_path / "x.pt")


# --- the reference's checkpoints -------------------------------------------------------------------------------------


def policy(residual: bool, layernorm: bool = False) -> collections.OrderedDict:
    """A state_dict of the reference's names: action_dim 3, horizon 4, observation 11, time_dim 16."""

    def linear(name, fan_in, fan_out):
        return {f"{name}.weight": torch.randn(fan_out, fan_in), f"{name}.bias": torch.randn(fan_out)}

    def norm(name, size):
        return {f"{name}.weight": torch.randn(size), f"{name}.bias": torch.randn(size)} if layernorm else {}

    state = {**linear("time_embedding.1", 16, 32), **linear("time_embedding.3", 32, 16)}
    if residual:
        state |= linear("mlp_mean.layers.0", 39, 8)
        for block in (1, 2):
            state |= linear(f"mlp_mean.layers.{block}.l1", 8, 8) | linear(f"mlp_mean.layers.{block}.l2", 8, 8)
            state |= norm(f"mlp_mean.layers.{block}.norm1", 8) | norm(f"mlp_mean.layers.{block}.norm2", 8)
        state |= linear("mlp_mean.layers.3", 8, 12)
    else:
        state |= linear("mlp_mean.moduleList.0.linear_1", 39, 8) | norm("mlp_mean.moduleList.0.norm_1", 8)
        state |= linear("mlp_mean.moduleList.1.linear_1", 8, 9) | norm("mlp_mean.moduleList.1.norm_1", 9)
        state |= linear("mlp_mean.moduleList.2.linear_1", 9, 12)
    return collections.OrderedDict(state)


def prefixed(prefix: str, state) -> dict:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def pre_trained(**options) -> dict:
    model, ema = policy(**options), policy(**options)
    ordered = collections.OrderedDict
    return {"epoch": 3000, "model": ordered(prefixed("network", model)), "ema": ordered(prefixed("network", ema))}


def fine_tuned(**options) -> dict:
    base = policy(**options)
    model = prefixed("network", base) | {"eta.eta_logit": torch.randn(1)} | prefixed("actor", base)
    model |= prefixed("actor_ft", {name: value.clone() for name, value in base.items()})  # equal, but not shared
    model |= prefixed("critic", {"Q1.moduleList.0.linear_1.weight": torch.randn(4, 11).double()})
    return {"itr": 7, "model": collections.OrderedDict(model)}


@pytest.mark.parametrize(
    ("data", "kind"), [(pre_trained(residual=True), "diffusion_policy"), (fine_tuned(residual=False), "dppo")]
)
def test_reference_to_ours_and_back(tmp_path, data, kind):
    torch.save(data, tmp_path / "theirs.pt")
    checkpoint = load_checkpoint(tmp_path / "theirs.pt")
    assert checkpoint.metadata["kind"] == kind
    save_checkpoint(tmp_path / "ours.safetensors", checkpoint.tensors, checkpoint.metadata)
    ours = load_checkpoint(tmp_path / "ours.safetensors")
    assert ours.metadata == checkpoint.metadata
    expected = [f"{group}.{name}" for group in ("model", "ema") if group in data for name in data[group]]
    assert list(ours.tensors) == expected
    save_checkpoint(tmp_path / "back.pt", ours.tensors, ours.metadata)

    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == list(data)
    for key, value in data.items():
        if isinstance(value, int):
            assert back[key] == value
            continue
        assert type(back[key]) is collections.OrderedDict and list(back[key]) == list(value)
        assert all(same(back[key][name], value[name]) for name in value)
    if kind == "dppo":
        pointer = {name: value.data_ptr() for name, value in back["model"].items()}
        for name in policy(residual=False):
            assert pointer[f"network.{name}"] == pointer[f"actor.{name}"] != pointer[f"actor_ft.{name}"]


def test_what_the_tensors_tell_about_the_network(tmp_path):
    def described(data):
        torch.save(data, tmp_path / "x.pt")
        return load_checkpoint(tmp_path / "x.pt").metadata["network"]

    common = {"time_dim": 16, "cond_mlp_dims": None, "cond_dim": 11, "output_dim": 12}
    residual = {"residual_style": True, "mlp_dims": [8, 8, 8, 8, 8]}
    assert described(pre_trained(residual=True)) == {**common, **residual, "use_layernorm": False}
    assert described(fine_tuned(residual=True, layernorm=True)) == {**common, **residual, "use_layernorm": True}
    plain = {"residual_style": False, "mlp_dims": [8, 9]}
    assert described(fine_tuned(residual=False, layernorm=True)) == {**common, **plain, "use_layernorm": True}
    data = pre_trained(residual=False)
    data["model"]["network.cond_mlp.moduleList.0.linear_1.weight"] = torch.randn(6, 22)
    data["model"]["network.cond_mlp.moduleList.1.linear_1.weight"] = torch.randn(11, 6)
    assert described(data) == {**common, **plain, "cond_dim": 22, "cond_mlp_dims": [6, 11], "use_layernorm": False}


def test_other_models_convert_too_as_of_unknown_kind(tmp_path):
    torch.save({"model": {"critic.a": torch.ones(2)}, "itr": 1, "note": "text", "loss": 0.5}, tmp_path / "x.pt")
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    assert checkpoint.metadata["kind"] == "unknown" and "network" not in checkpoint.metadata
    save_checkpoint(tmp_path / "y.pt", checkpoint.tensors, checkpoint.metadata)
    back = torch.load(tmp_path / "y.pt", weights_only=True)
    assert list(back) == ["model", "itr", "note", "loss"] and back["note"] == "text" and back["loss"] == 0.5


def test_a_run_of_ours_becomes_what_the_reference_loads():
    """Only weights and the counter go; `network.*` is added where a fine-tuned model names its base `actor.*` alone."""
    tensors = {
        "model.actor.w": np.ones(2, np.float32),
        "model.actor_ft.w": np.zeros(2, np.float32),
        "optimizer.actor.exp_avg.w": np.ones(2, np.float32),
        "train.env": np.ones(3),
    }
    data = to_reference(tensors, {"kind": "dppo", "itr": 12, "train": {"x": 1}})
    assert list(data) == ["itr", "model"] and data["itr"] == 12
    assert list(data["model"]) == ["network.w", "actor.w", "actor_ft.w"]
    assert data["model"]["network.w"] is data["model"]["actor.w"]
    with pytest.raises(UserError, match="these have none"):
        to_reference({"train.x": np.ones(1)}, {})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([1], "no .model."),
        ({"ema": {}}, "no .model."),
        ({"model": [1]}, "no .model."),
        ({"model": {"a": 1}}, "'a' of its .model. is not a tensor"),
        ({"model": {1: np.ones(1)}}, "'1' of its .model. is not a tensor"),
        ({"model": {}, "ema": 3}, "its .ema. is no state_dict"),
        ({"model": {}, "optimizer": {}}, "unexpected entry 'optimizer'"),
        ({"model": {}, 5: 1}, "unexpected entry '5'"),
        ({"model": {}, "itr": 2**70}, "unexpected entry 'itr'"),
    ],
)
def test_other_contents_are_named(data, problem):
    with pytest.raises(UserError, match=f"^x.pt.*{problem}"):
        from_reference(data, name="x.pt")


def test_bfloat16_keeps_its_type_through_both_formats(tmp_path):
    data = {"itr": 0, "model": {"a": random_tensor(torch.bfloat16, (3, 4))}}
    torch.save(data, tmp_path / "x.pt")
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    assert checkpoint.tensors["model.a"].dtype == ml_dtypes.bfloat16
    save_checkpoint(tmp_path / "x.safetensors", checkpoint.tensors, checkpoint.metadata)
    assert same(load_checkpoint(tmp_path / "x.safetensors").tensors["model.a"], data["model"]["a"])


# --- the command -----------------------------------------------------------------------------------------------------


def convert(*arguments, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CODE)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_converts_both_ways_and_overwrites_only_by_force(tmp_path):
    torch.save(fine_tuned(residual=True), tmp_path / "a.pt")
    done = convert("a.pt", "b.safetensors", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "kind: dppo" in done.stdout and "itr: 7" in done.stdout and "'time_dim': 16" in done.stdout
    assert "model.actor_ft" in done.stdout and "wrote b.safetensors" in done.stdout
    before = (tmp_path / "b.safetensors").read_bytes()
    again = convert("a.pt", "b.safetensors", folder=tmp_path)
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (2, "", 1)
    assert "b.safetensors exists" in again.stderr
    assert convert("a.pt", "b.safetensors", "--force", folder=tmp_path).returncode == 0
    assert (tmp_path / "b.safetensors").read_bytes() == before
    assert convert("b.safetensors", "c.pt", folder=tmp_path).returncode == 0
    a, c = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "c.pt"))
    assert list(a["model"]) == list(c["model"])
    assert all(same(a["model"][name], c["model"][name]) for name in a["model"])


def test_the_command_refuses_in_one_line_with_status_2(tmp_path):
    (tmp_path / "evil.pt").write_bytes(HOSTILE["os.system, protocol 2"])
    for arguments in (
        ("evil.pt", "x.safetensors"),
        ("gone.pt", "x.safetensors"),
        ("evil.pt", "x.pt"),
        ("a.h5", "b.pt"),
    ):
        done = convert(*arguments, folder=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("Error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]
