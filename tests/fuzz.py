"""Mutated files of every format that is read, each format in a process of its own with little memory and a clock.

    python -m tests.fuzz [FORMAT[:NUMBER] …]        a line of JSON for each format; NUMBER of inputs instead of all

Of each input must come a value or a UserError of one line, within seconds, in less than 1 GB, and without anything
being executed, imported, unpickled, written or connected to on the way. The draws have a fixed seed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import pickletools
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from diffusion_rl.cli import experiments
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import read_json
from diffusion_rl.core.npz import read_npy, read_npz
from diffusion_rl.data import kuka, sources
from diffusion_rl.data import plan_windows as flat
from diffusion_rl.data.episodes import load_episodes
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.data.sources import d3il
from diffusion_rl.interop import diffuser_checkpoint
from diffusion_rl.interop.torch_checkpoint import read_pt, write_pt
from diffusion_rl.reports import lite_figures
from diffusion_rl.training.checkpoint import checkpoint_metadata, load_checkpoint, save_checkpoint

SECONDS, BYTES = 10, 1_000_000_000  # of one input
NUMBERS = (0, 1, 2, 255, 2**15, 2**28, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
FORBIDDEN = re.compile(
    r"os\.(system|exec|fork|posix_spawn|spawn|remove|rename|mkdir|kill)|subprocess|socket|pickle|shutil|ctypes"
)
Payloads = Iterator[bytes]


# ---------- mutations of bytes, whatever they mean ----------


def damaged(good: bytes, draw: random.Random) -> bytes:
    """One to three of: bits turned, bytes set, numbers replaced, a run repeated, dropped or moved, the end cut off."""
    data = bytearray(good)
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 8, 16, 64, 256))
        kind = draw.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + length] = bytes([draw.choice((0, 255, 127, 128, 10, 46))]) * len(data[at : at + length])
        elif kind == 2:
            width, code = draw.choice(((2, "H"), (4, "I"), (8, "Q")))
            data[at : at + width] = struct.pack(draw.choice("<>") + code, draw.choice(NUMBERS) % (1 << 8 * width))
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            other = draw.randrange(len(data) + 1)
            data[at : at + length] = data[other : other + length]
        else:
            del data[at:]
    return bytes(data)


def retyped(text: str, draw: random.Random) -> str:
    """A text of numbers, names and brackets in which one to three of them have become something else."""
    for _ in range(draw.randint(1, 3)):
        words = re.findall(r"[A-Za-z_]+|-?[0-9.]+|\s+|.", text, re.DOTALL)
        at = draw.randrange(len(words))
        others = [
            str(draw.choice(NUMBERS)),
            "-1",
            "1e400",
            "NaN",
            "null",
            "true",
            '"x"',
            "[]",
            "{}",
            "",
            "\0",
            "é",
            "[" * 900,
        ]
        others += [
            words[at] * 2,
            draw.choice(words),
            "&a",
            "*a",
            "!!python/object:os.system",
            "<<",
            "9" * 5000,
            "2001-99-99",
        ]
        words[at] = draw.choice(others)
        text = "".join(words)
    return text


# ---------- a good file of each format, and mutations that keep to its structure ----------


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_with_header(good: bytes, draw: random.Random) -> bytes:
    """The array under a header that says something else."""
    header = good[10:128].decode("latin1")
    changed = retyped(header, draw).encode("latin1", "replace")
    changed = draw.choice((changed, header.replace("<f4", draw.choice(("|O", "<U9", "V0", "<f8", "<M8[s]"))).encode()))
    return good[:8] + struct.pack("<H", len(changed) % 65536) + changed + good[128:]


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def arrays_of_episodes() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        k: draw.uniform(-1, 1, (12, n)).astype("f") for k, n in (("states", 3), ("actions", 2))
    }
    arrays |= {"traj_lengths": np.array([5, 7]), "rewards": np.ones(12, "f"), "terminals": np.arange(12) == 11}
    bounds = {
        f"{k}_{end}": np.full(n, at, "f")
        for k, n in (("obs", 3), ("action", 2))
        for end, at in (("min", -1), ("max", 1))
    }
    return arrays | bounds


def npz_files(draw: random.Random) -> Payloads:
    members = {f"{k}.npy": npy(v) for k, v in arrays_of_episodes().items()}
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    yield zipped(members)
    bomb = npy_with_shape((200_000_000,)) + bytes(200_000_000)
    yield zipped(members | {"states.npy": bomb}, zipfile.ZIP_DEFLATED)
    while True:
        name, method = draw.choice(list(members)), draw.choice(methods)
        yield damaged(zipped(members, draw.choice(methods[:2])), draw)
        yield zipped(members | {name: npy_with_header(members[name], draw)}, method)
        yield zipped(members | {name: damaged(members[name], draw)}, method)


def npy_with_shape(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def npy_files(draw: random.Random) -> Payloads:
    good = npy(np.random.default_rng(0).normal(size=(4, 39)).astype("f"))
    yield good
    while True:
        yield damaged(good, draw)
        yield npy_with_header(good, draw)


def plain_hdf5(build: Callable[[h5py.File], None]) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        build(file)
    return buffer.getvalue()


def d4rl_layout(file: h5py.File) -> None:
    fields = {"observations": np.zeros((20, 3), "f"), "actions": np.zeros((20, 2), "f"), "rewards": np.ones(20, "f")}
    for name, value in (fields | {"terminals": np.arange(20) == 19, "timeouts": np.zeros(20, bool)}).items():
        file.create_dataset(name, data=value, compression="gzip" if name == "actions" else None)


def minari_layout(file: h5py.File) -> None:
    for i in range(2):
        group = file.create_group(f"episode_{i}")
        group["observations/a"], group["actions"] = np.zeros((6, 3)), np.zeros((5, 2))
        group["rewards"], group["terminations"] = np.ones(5), np.arange(5) == 4
    file.attrs["action_space"] = '{"type": "Box"}'


def robomimic_layout(file: h5py.File) -> None:
    group = file.create_group("data/demo_0")
    for name in ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"):
        group[f"obs/{name}"] = np.zeros((5, 2))
    group["actions"], group["rewards"] = np.zeros((5, 7)), np.ones(5)


def odd_node(parent: h5py.Group, name: str, draw: random.Random) -> None:
    """Something else under a known name."""
    kind = draw.randrange(12)
    if kind == 0:
        parent.create_group(name)
    elif kind == 1:
        parent[name] = draw.choice((5.0, np.zeros(0), np.zeros((20, 0)), np.zeros((3, 3, 3)), np.full((20, 3), np.nan)))
    elif kind == 2:
        parent[name] = h5py.SoftLink(draw.choice(("/nowhere", f"/{name}", ".", "..", "/observations/x", "/")))
    elif kind == 3:
        parent[name] = h5py.ExternalLink(draw.choice(("/dev/zero", "/etc/passwd", "pipe", "x.hdf5")), "/observations")
    elif kind == 4:
        odd = (h5py.Empty("f4"), np.array([b"x"] * 20), np.zeros(20, "f4,i4"), np.zeros(20, "c8"))
        parent[name] = draw.choice(odd)
    elif kind == 5:
        parent.create_dataset(
            name, draw.choice(((1 << 40, 3), (20, 1 << 40), (1 << 28, 3), (20, 3))), "f4", chunks=True
        )
    elif kind == 6:
        parent.create_dataset(
            name, (20, 3), "f4", maxshape=(None, 3), chunks=(1 << 26, 3), compression="gzip", fillvalue=1
        )
    elif kind == 7:
        parent.create_dataset(name, (20, 3), "f4", external=[(draw.choice(("/dev/zero", "pipe")), 0, 240)])
    elif kind == 8:
        layout = h5py.VirtualLayout((20, 3), "f4")
        layout[:] = h5py.VirtualSource("/dev/zero", "x", (20, 3))
        parent.create_virtual_dataset(name, layout)
    elif kind == 9:
        node = parent.create_dataset(name, (20, 3), "f4", chunks=(20, 3), compression="gzip")
        node.id.write_direct_chunk((0, 0), draw.choice((b"", b"no", BOMB)))
    elif kind == 10:
        parent[name] = np.dtype("f4")
    else:
        parent.create_dataset(name, data=np.zeros(20, "i8"), dtype=draw.choice(("i8", "f2", "u1")))


BOMB = zlib.compress(bytes(300_000_000))


def hdf5_files(draw: random.Random) -> Payloads:
    layouts = (d4rl_layout, minari_layout, robomimic_layout)
    goods = [plain_hdf5(layout) for layout in layouts]
    yield from goods
    while True:
        yield damaged(draw.choice(goods), draw)
        yield damaged(draw.choice(goods), draw)
        with io.BytesIO(draw.choice(goods)) as buffer:
            with h5py.File(buffer, "r+") as file:
                names: list[str] = []
                file.visit(names.append)
                name = draw.choice(names)
                del file[name]
                with contextlib.suppress(OSError, ValueError, RuntimeError, TypeError):  # of what cannot be written
                    odd_node(file, name, draw)
            yield buffer.getvalue()


def spliced_pickle(good: bytes, draw: random.Random) -> bytes:
    """The instructions of a pickle with some left out, repeated or replaced."""
    starts = [position for _, _, position in pickletools.genops(good)] + [len(good)]
    parts = [good[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(parts))
        extra = (
            *(
                b"}",
                b"]",
                b")",
                b"(",
                b"N",
                b"t",
                b"u",
                b"s",
                b"a",
                b"e",
                b"R",
                b"b",
                b"o",
                b"0",
                b"2",
                b"\x81",
                b"\x85",
                b"\x86",
            ),
            *(
                b"\x93",
                b"Q",
                b"\x94",
                b"\x8f",
                b"\x90",
                b"\x92",
                b"cos\nsystem\n",
                b"cbuiltins\neval\n",
                b"h\x00",
                b"h\x01",
            ),
            *(b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"\x96" + struct.pack("<Q", 1 << 33), b"X\xff\xff\xff\x7f"),
            *(b"\x8e" + struct.pack("<Q", 1 << 40), b"\x8b" + struct.pack("<i", 1 << 30), b"I" + b"9" * 9000 + b"\n"),
            *(b"\x95" + struct.pack("<Q", 1 << 60), b"}h\x00Ns", b"X\x03\x00\x00\x00rm "),
        )
        parts[at : at + draw.randrange(2)] = [draw.choice((draw.choice(extra), draw.choice(parts)))]
    return b"".join(parts)


TOWER = b"\x80\x02)q\x00" + b"".join((b"h" + bytes([i])) * 3 + b"\x87q" + bytes([i + 1]) for i in range(60))
REPEATS = b"\x80\x02]q\x00(" + b"N" * 20_000 + b"e" + b"(h\x00e" * 3


def pickle_files(good: bytes, draw: random.Random) -> Payloads:
    yield good
    yield b"\x80\x02}r" + struct.pack("<I", 1 << 28) + b"."
    yield TOWER + b"}h<Ns."
    yield TOWER + b"h<."
    yield REPEATS + b"."
    while True:
        yield damaged(good, draw)
        yield spliced_pickle(good, draw)


def recordings(draw: random.Random) -> Payloads:
    path = np.linspace(0, 1, 15).reshape(5, 3)
    return pickle_files(pickle.dumps({"robot": {"des_c_pos": path, "c_pos": path, "step": [1, 2]}}, 4), draw)


def configurations(draw: random.Random) -> Payloads:
    label = b"cdiffuser.models.temporal\nTemporalUnet\n"
    state = pickle.dumps({"horizon": 4, "dim_mults": (1, 2, 4), "clip": False, "scale": 0.5, "names": ["a"]}, 2)[2:-1]
    program = b"\x80\x02cdiffuser.utils.config\nConfig\n)\x81}(X\x06\x00\x00\x00_class" + label
    return pickle_files(program + b"X\x05\x00\x00\x00_dict" + state + b"ub.", draw)


def weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    layers = {f"network.mlp_mean.layers.{i}.{k}": s for i in (0, 1) for k, s in (("weight", (4, 4)), ("bias", (4,)))}
    return {name: draw.normal(size=shape).astype("f") for name, shape in layers.items()} | {"betas": np.ones(3, "f")}


def good_pt(folder: Path) -> bytes:
    moments = {0: {"step": np.ones((), "f"), "exp_avg": np.ones(2, "f")}}
    beside = {
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99)}]},
        "config": {"a": None},
    }
    write_pt(folder / "good.pt", {"epoch": 3, "model": weights(), "ema": weights(), **beside})
    return (folder / "good.pt").read_bytes()


def pt_files(draw: random.Random) -> Payloads:
    with tempfile.TemporaryDirectory() as folder:
        good = good_pt(Path(folder))
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    yield good
    program = "archive/data.pkl"
    for tower in (TOWER + b"}h<Ns.", TOWER + b"h<.", REPEATS + b"."):
        yield zipped(members | {program: tower})
    while True:
        yield damaged(good, draw)
        yield zipped(members | {program: spliced_pickle(members[program], draw)})
        yield zipped(members | {program: damaged(members[program], draw)}, draw.choice((0, 0, 0, zipfile.ZIP_DEFLATED)))


def legacy_pt_files(draw: random.Random) -> Payloads:
    """Of torch before 1.6: pickles one after the other, and storages."""
    good = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"model": {"a": 1}}, 2)
    return pickle_files(good + bytes(64), draw)


def safetensors_files(draw: random.Random) -> Payloads:
    facts = {
        "kind": "diffusion_policy",
        "epoch": 3,
        "obs_dim": 4,
        "sampling": {"use_ddim": False},
        "train": {"noise": None},
    }
    facts |= {"normalization": {"obs_min": [-1.0], "obs_max": [1.0]}, "config": {"train": {"fast": True}}}
    facts |= {"description": {"dataset": {}, "model": {"class": "x"}, "diffusion": {}}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"

        def signed(metadata: dict[str, Any]) -> bytes:
            save_checkpoint(path, {f"model.{k}": v for k, v in weights().items()}, metadata)
            return path.read_bytes()

        good = signed(facts)
        length = int.from_bytes(good[:8], "little")
        yield good
        while True:
            yield damaged(good, draw)
            header = retyped(good[8 : 8 + length].decode(), draw).encode()
            yield draw.choice((struct.pack("<Q", len(header)), good[:8])) + header + good[8 + length :]
            try:  # facts of another type, with a right checksum
                changed = json.loads(retyped(json.dumps(facts), draw))
            except (ValueError, RecursionError):
                continue
            if isinstance(changed, dict) and "file" not in changed:
                yield signed(changed)


def text_files(good: str) -> Callable[[random.Random], Payloads]:
    def files(draw: random.Random) -> Payloads:
        yield good.encode()
        for bracket in ("[", "{", '{"a":', "[[", "- "):
            yield (bracket * 50_000).encode()
        while True:
            yield damaged(good.encode(), draw)
            yield retyped(good, draw).encode("utf-8", "replace")

    return files


ROWS = json.dumps([{"gradient_steps": 10, "loss0": 0.5, "name": "x"}, {"gradient_steps": 20, "loss0": 0.25}], indent=1)
EXPERIMENT = """
meta_data: {exp_name: name, script_path: train.py, num_workers: 2}
variables: {seed: [0, 1], model: {lr: [1e-4, 0.5]}}
constants:
  base: &base {horizon: 8, names: [a, 'b', null], day: 2001-01-01, on: yes}
  other:
    <<: *base
    text: |
      lines
"""
BILLION = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


def yaml_files(draw: random.Random) -> Payloads:
    yield BILLION.encode()
    yield from text_files(EXPERIMENT)(draw)


def averaged_weights(path: Path) -> None:
    diffuser_checkpoint.averaged_weights(path, 3)


def trajectories(path: Path) -> None:
    kuka.read_trajectories(path.parent)


# name -> suffix, mutated files, readers, number of inputs
def read_losses(path: Path) -> Any:
    return lite_figures.read_rows(path, lite_figures.LOSSES)


FORMATS: dict[str, tuple[str, Callable[[random.Random], Payloads], tuple[Callable[[Path], Any], ...], int]] = {
    "safetensors": (".safetensors", safetensors_files, (load_checkpoint, checkpoint_metadata), 3000),
    "pt": (
        ".pt",
        pt_files,
        (read_pt, load_checkpoint, averaged_weights),
        2500,
    ),
    "pt_legacy": (".pt", legacy_pt_files, (read_pt, load_checkpoint), 300),
    "npz": (".npz", npz_files, (load_episodes, MinMaxNormalizer.from_npz, read_npz, sources.load), 2000),
    "npy": (".npy", npy_files, (read_npy, trajectories), 3000),
    "hdf5": (".hdf5", hdf5_files, (sources.load, lambda path: sources.load(path, ["a"]), flat.read_flat), 3000),
    "pickle_d3il": (".pkl", recordings, (d3il.read,), 3000),
    "pickle_diffuser": (".pkl", configurations, (diffuser_checkpoint.read_config,), 3000),
    "json": (".json", text_files(ROWS), (read_json, read_losses), 3000),
    "yaml": (".yaml", yaml_files, (experiments.read_spec,), 1000),
}


# ---------- running them ----------


def read_all(name: str, count: int, folder: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    """Read the first `count` inputs of a format; `tell` before each, and of each that went wrong."""
    suffix, files, readers, _ = FORMATS[name]
    path, draw, happened = folder / f"x{suffix}", random.Random(f"{name} 1"), list[str]()
    watch(happened)
    payloads = files(draw)
    for number in range(count):
        payload = next(payloads)
        path.write_bytes(payload)
        for reader in readers:
            tell({"number": number, "reader": getattr(reader, "__qualname__", "")})
            happened.clear()
            signal.alarm(SECONDS)
            problem = outcome(reader, path)
            signal.alarm(0)
            if number > 0 and happened:
                problem = f"it did {happened[0]}"
            if problem:
                tell({"problem": f"input {number}, {getattr(reader, '__qualname__', '')}: {problem}"})
    tell({"peak": peak_bytes()})


def outcome(reader: Callable[[Path], Any], path: Path) -> str:
    """What is wrong with the way in which a reader ends; "" for a value or an error of one line."""
    try:
        reader(path)
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            return f"memory: {error}"
        return "more than one line" if "\n" in str(error) or len(str(error)) > 1000 else ""
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def watch(happened: list[str]) -> None:
    """Note what no reader may do."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if FORBIDDEN.match(event) or (event == "import" and arguments[0] in ("os", "subprocess", "builtins")) or writes:
            happened.append(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(name: str, count: int) -> dict[str, Any]:
    """Read the first `count` inputs of a format in a child: its "problems", "peak" of memory (bytes), "last" input."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (used_address_space() + BYTES,) * 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with tempfile.TemporaryDirectory() as folder, os.fdopen(writing, "w") as pipe:
            os.chdir(folder)
            os.mkfifo("pipe")
            (Path(folder) / "data").mkdir()
            read_all(name, count, Path(folder) / "data", lambda fact: print(json.dumps(fact), file=pipe, flush=True))
        os._exit(0)
    os.close(writing)
    result: dict[str, Any] = {"format": name, "problems": [], "peak": 0, "last": {}}
    with os.fdopen(reading) as pipe:
        for line in pipe:
            fact = json.loads(line)
            if "problem" in fact:
                result["problems"].append(fact["problem"])
            else:
                result.update({"peak": fact["peak"]} if "peak" in fact else {"last": fact})
    _, status = os.waitpid(child, 0)
    if status:
        cause = f"signal {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else f"status {status}"
        result["problems"].append(f"ended by {cause} in {result['last']}")
    return result


def used_address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    for argument in sys.argv[1:] or FORMATS:
        format_name, _, number = argument.partition(":")
        print(json.dumps(run(format_name, int(number or FORMATS[format_name][3]))), flush=True)
