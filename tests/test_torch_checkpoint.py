"""`.pt` files: bit-exact both ways; checkpoints of the reference; the converter."""

import collections
import math
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion_rl
from diffusion_rl.core.errors import UserError
from diffusion_rl.interop.reference_checkpoint import from_reference, to_reference
from diffusion_rl.interop.torch_checkpoint import read_pt, write_pt
from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint

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
    "value",
    [b"bytes", {1, 2}, object(), np.array(["text"]), np.array([None]), np.ones(2, ">c32")],
    ids=["bytes", "set", "object", "text array", "object array", "complex"],
)
def test_what_cannot_be_written_is_named(tmp_path, value):
    with pytest.raises(UserError, match="cannot hold"):
        write_pt(tmp_path / "x.pt", {"a": [value]})
    loop = []
    loop.append(loop)
    with pytest.raises(UserError, match="within themselves"):
        write_pt(tmp_path / "x.pt", loop)
    assert not list(tmp_path.iterdir())


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
        return load_checkpoint(tmp_path / "x.pt").metadata["networks"]["network"]

    common = {"class": "DiffusionMLP", "time_dim": 16, "cond_mlp_dims": None, "cond_dim": 11, "output_dim": 12}
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
    assert checkpoint.metadata["kind"] == "unknown" and checkpoint.metadata["networks"] == {}
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
        ({"model": {"a": 1}}, "no .model."),
        ({"epoch": 3, "config": {"lr": 1e-3}}, "no .model."),
        ({"model": {"a": np.ones(1), "module.a": np.ones(1)}}, "the weight 'a' of its 'model' is there twice"),
    ],
)
def test_other_contents_are_named(data, problem):
    with pytest.raises(UserError, match=f"^x.pt.*{problem}"):
        from_reference(data, name="x.pt")


def weights_of_forks():
    """Files of others' trainings that hold the weights of `fine_tuned`, and what is said to lie beside them."""
    plain = fine_tuned(residual=True)["model"]
    network = {name.removeprefix("network."): value for name, value in plain.items() if name.startswith("network.")}
    moments = {
        "state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(2)}},
        "param_groups": [{"betas": (0.9, 0.99)}],
    }
    beside = {"optimizer": moments, "lr_scheduler": {"_last_lr": [1e-3]}, "config": {"seed": None, "dims": [1, 2]}}
    return {
        "optimizer, scheduler and configuration": ({"model": plain, **beside}, "optimizer, lr_scheduler, config"),
        "ema alone": ({"ema": plain}, None),
        "bare": (plain, None),
        "the network alone": (network, None),
        "bare, with a list": ({**plain, "losses": [1.0, 2.0]}, "losses"),
        "state_dict": ({"state_dict": plain, "epoch": 3}, None),
        "model_state_dict": ({"model_state_dict": plain, "optimizer_state_dict": moments}, "optimizer_state_dict"),
        "DistributedDataParallel": ({"model": {f"module.{k}": v for k, v in plain.items()}}, None),
        "torch.compile": ({"model": {k.replace("network.", "network._orig_mod."): v for k, v in plain.items()}}, None),
        "both": ({"model": {f"module._orig_mod.{k}": v for k, v in plain.items()}}, None),
        "a number among the weights": ({"model": {**plain, "version": 3}}, "model.version"),
        "an average of another kind": ({"model": plain, "ema": {"decay": 0.9, "shadow": [1]}}, "ema"),
    }


@pytest.mark.parametrize("name", weights_of_forks())
def test_weights_of_forks_are_taken_and_what_is_left_aside_is_named(name, tmp_path, caplog):
    data, beside = weights_of_forks()[name]
    plain = fine_tuned(residual=True)["model"]
    torch.save(data, tmp_path / "x.pt")
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    weights = checkpoint.select("model.") or checkpoint.select("ema.")
    expected = {k: v for k, v in plain.items() if name != "the network alone" or "network." in k}
    assert set(weights) == set(expected) and all(weights[k].shape == tuple(v.shape) for k, v in expected.items())
    assert checkpoint.metadata["kind"] == ("diffusion_policy" if name == "the network alone" else "dppo")
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition("beside them: ")[2] for line in said] == ([beside] if beside else []), said
    save_checkpoint(tmp_path / "y.pt", checkpoint.tensors, checkpoint.metadata)
    again = load_checkpoint(tmp_path / "y.pt")
    assert {name.partition(".")[2] for name in again.tensors} == set(expected)


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
    assert "kind: dppo" in done.stdout and "itr: 7" in done.stdout and "time_dim=16" in done.stdout
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
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:  # more of them in test_hostile_pickles.py
        archive.writestr("archive/data.pkl", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.")
        archive.writestr("archive/version", "3\n")
    for arguments in (
        ("evil.pt", "x.safetensors"),
        ("gone.pt", "x.safetensors"),
        ("evil.pt", "x.pt"),
        ("a.h5", "b.pt"),
    ):
        done = convert(*arguments, folder=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


def test_the_command_says_what_to_do_about_damaged_and_foreign_files(tmp_path):
    torch.save(fine_tuned(residual=True), tmp_path / "good.pt")
    save_checkpoint(tmp_path / "good.safetensors", *from_reference(read_pt(tmp_path / "good.pt")))
    for suffix in ("pt", "safetensors"):
        payload = (tmp_path / f"good.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(payload[: len(payload) // 2])
        np.savez(tmp_path / "data.npz", states=np.zeros((3, 2)))
        (tmp_path / "data.npz").rename(tmp_path / f"foreign.{suffix}")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "bare.pt")
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "bare.safetensors")
    for name, complaint, cure in (
        ("cut.pt", "is damaged", "use another copy"),
        ("cut.safetensors", "is damaged", "use another, or delete it"),
        ("foreign.pt", "refused: it is a zip archive, but not of the form that torch.save writes", "nothing in it was"),
        ("foreign.safetensors", "is damaged", "use another, or delete it"),
        ("bare.pt", "is of no method that this package knows", "parts of its model: "),
        ("bare.safetensors", "no checkpoint of this package", "give the state_<n>.safetensors that a training wrote"),
    ):
        target = "x.safetensors" if name.endswith(".pt") else "x.pt"
        done = convert(name, target, folder=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith(f"error: {name} ") and complaint in done.stderr and cure in done.stderr
        assert not (tmp_path / target).exists()
