"""A checkpoint's policy as a SavedModel or a TFLite model that needs nothing but TensorFlow.

An export is written under a temporary name, loaded again, compared with the checkpoint's own policy on random
observations, and only then takes its name. What is in it: `export.deployed`.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.config.declared import declared, declaring
from diffusion_rl.config.instantiate import find_class, flatten, instantiate_trusted
from diffusion_rl.config.keys import check_numbers
from diffusion_rl.config.targets import CHECKPOINT_CLASSES
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import reading
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.quiet import without_stderr
from diffusion_rl.core.typing import Rng
from diffusion_rl.data.normalizers import KEYS, MinMaxNormalizer
from diffusion_rl.export.deployed import (
    DeployedPolicy,
    Policy,
    deterministic_plan,
    noise_shapes,
    observation_shapes,
)
from diffusion_rl.interop.torch_names import load_state_dict
from diffusion_rl.policies import flow
from diffusion_rl.policies.diffusion import DiffusionPolicy, FineTunedDiffusionPolicy
from diffusion_rl.policies.flow import FlowPolicy
from diffusion_rl.policies.gaussian import GaussianPolicy
from diffusion_rl.policies.gmm import GMMPolicy
from diffusion_rl.training.checkpoint import Checkpoint, load_checkpoint
from diffusion_rl.training.evaluation import fine_tuned_steps
from diffusion_rl.training.policy_files import GAUSSIAN_SAMPLING, SAMPLING, is_fine_tuned, load_policy, policy_weights

SIGNATURES = {"serving_default": "act", "with_noise": "act_with_noise"}
DEFAULT_ENDING = {"savedmodel": "_savedmodel", "tflite": ".tflite"}  # of the output's name, by format
TOLERANCE = 1e-5  # of an action, or of half its range where that is more than 1
LARGEST_SETTING = 1024  # of a network, that need not show in the shape of a weight
CHECKED = 32  # random observations
TIMED, WARM_UP = 300, 20  # decisions

FAMILIES = (DiffusionPolicy, FlowPolicy, GaussianPolicy, GMMPolicy)  # one of these is what every policy acts as
POLICIES = ("diffusion_rl.policies", "diffusion_rl.methods.on_policy", "diffusion_rl.methods.off_policy")

Run = Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]  # (signature, inputs by name) -> outputs


@dataclass(frozen=True)
class Source:
    """A checkpoint's policy with what is needed to act with it."""

    policy: Policy
    normalizer: MinMaxNormalizer
    cond_steps: int
    act_steps: int
    kind: str


@dataclass(frozen=True)
class Exported:
    """What was written, and what was measured on it: seconds for each of `TIMED` decisions at batch 1."""

    path: Path
    kind: str
    inputs: dict[str, tuple[int | None, ...]]
    deviation: float
    seconds: np.ndarray

    def report(self) -> str:
        """Returns what people read of it."""
        size = sum(file.stat().st_size for file in [self.path, *self.path.rglob("*")] if file.is_file())
        milliseconds = 1000 * self.seconds
        shapes = {name: ",".join("B" if n is None else str(n) for n in shape) for name, shape in self.inputs.items()}
        return (
            f"{self.kind} with inputs {', '.join(f'{name} [{shape}]' for name, shape in shapes.items())}\n"
            f"acts as the checkpoint does: at most {self.deviation:.1e} apart over {CHECKED} random observations\n"
            f"latency of a decision at batch 1: median {np.median(milliseconds):.2f} ms, "
            f"p99 {np.percentile(milliseconds, 99):.2f} ms over {len(milliseconds)}\n"
            f"wrote {self.path} ({size / 1e6:.2f} MB)"
        )


def export_policy(
    checkpoint: str | Path,
    kind_of_file: str,
    output: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    force: bool = False,
    allow: Collection[str] = (),
) -> Exported:
    """Writes the policy of `checkpoint` as a SavedModel (a folder, any batch) or a TFLite model (a file, batch 1).

    Args:
        kind_of_file: savedmodel or tflite.
        output: default: beside the checkpoint, named after it.
        config: the resolved configuration, for checkpoints that hold none (the reference's).
        force: replace an export that is there.
        allow: as of `open_policy`.

    Raises:
        UserError: the checkpoint cannot be read or says too little, its policy is of a kind that cannot be exported,
            the output cannot be written, or what was written does not act as the checkpoint does.
    """
    if kind_of_file not in DEFAULT_ENDING:
        raise UserError(f"unknown format {kind_of_file!r}: choose {' or '.join(DEFAULT_ENDING)}")
    path = Path(checkpoint)
    target = Path(output) if output else path.with_name(path.stem + DEFAULT_ENDING[kind_of_file])
    require_free(target, force)
    source = open_policy(path, config, allow)
    batch = 1 if kind_of_file == "tflite" else None
    with work_folder(target) as folder:
        written = write_saved_model(source, folder / "savedmodel", batch)
        if kind_of_file == "tflite":
            written = write_tflite(written, folder / "model.tflite")
        run = load_tflite(written) if kind_of_file == "tflite" else load_saved_model(written)
        deviation = verify(source, run, batch)
        seconds = latency(source, run)
        put_in_place(written, target)
    return Exported(target, source.kind, input_shapes(source, batch), deviation, seconds)


# ---------- from the checkpoint ----------


def open_policy(path: Path, config: Mapping[str, Any] | None = None, allow: Collection[str] = ()) -> Source:
    """Returns the policy in a checkpoint, built as its configuration says and filled with its weights.

    allow: classes of networks that are not this package's ("my_networks.Denoiser"), which the checkpoint may name.
    """
    checkpoint = load_checkpoint(path)
    if "description" in checkpoint.metadata:
        raise UserError(
            f"{path} is a planner's ({checkpoint.metadata.get('kind')}), which runs in scripts/plan_*.py only"
        )
    config = config or checkpoint.metadata.get("config")
    if not config or not config.get("model"):
        raise UserError(f"{path} does not hold its configuration: add --config <name of the one it was trained with>")
    with reading(path, "use another checkpoint", "holds a configuration that describes no policy"):
        check_numbers(config)
        cls = exportable_class(str(config["model"].get("_target_")), path)
        policy = build_policy(cls, checkpoint, config, path, allow)
        load_policy(policy, checkpoint, path)
        if acting := checkpoint.select(f"model.{getattr(cls, 'ACTS_WITH', ' ')}."):
            load_state_dict(policy.network, acting)
        act_steps = int(config.get("act_steps") or policy.horizon_steps)
        normalizer = normalizer_of(checkpoint, config, path)
        return Source(policy, normalizer, int(config.get("cond_steps") or 1), act_steps, checkpoint.metadata["kind"])


def exportable_class(target: str, path: Path) -> type:
    """Returns the class of this package that a checkpoint says its policy is of.

    Raises:
        UserError: it is no policy of this package, or it says itself that it cannot be exported (`EXPORTABLE`).
    """
    if target.startswith(tuple(f"{package}." for package in POLICIES)) and declared(target, "KIND"):
        cls = find_class(target)
        cls = getattr(cls, "ACTS_AS", cls)
        if issubclass(cls, FAMILIES) and getattr(cls, "EXPORTABLE", True):
            return cls
    classes = [
        name for package in POLICIES for name in declaring(package, "KIND") if declared(name, "EXPORTABLE", True)
    ]
    names = ", ".join(sorted(name.rpartition(".")[2] for name in classes))
    raise UserError(f"{path} is of a {target.rpartition('.')[2]}, which cannot be exported; these can: {names}")


def build_policy(
    cls: type, checkpoint: Checkpoint, config: Mapping[str, Any], path: Path, allow: Collection[str] = ()
) -> Policy:
    """Returns the acting part of what the configuration describes: networks of values are not built."""
    node = {key: value for key, value in config["model"].items() if key != "_target_"}
    acts_as = next(family for family in FAMILIES if issubclass(cls, family))
    if hasattr(cls, "from_description"):  # of more than one network
        refuse_larger(node, checkpoint, path)
        return cls.from_description(node, lambda network: instantiate_trusted(network, CHECKPOINT_CLASSES, allow))
    network = node.pop("network", None) or node.pop("actor", None) or node.pop("policy", None)
    refuse_larger(network, checkpoint, path)
    network = instantiate_trusted(network, CHECKPOINT_CLASSES, allow)
    sampling = checkpoint.metadata.get("sampling") or {}
    if issubclass(acts_as, DiffusionPolicy):
        if fine_tuned := is_fine_tuned(policy_weights(checkpoint)):
            node |= {k: sampling[k] for k in SAMPLING if k in sampling}
            asked = int(node.get("ft_denoising_steps") or config.get("ft_denoising_steps") or 0)
            node["ft_denoising_steps"] = 0 if "ft_denoising_steps" in checkpoint.metadata else asked
            node["ft_denoising_steps"] = fine_tuned_steps(checkpoint, node["ft_denoising_steps"], path)
        plain = {k: v for k, v in node.items() if not isinstance(v, Mapping)}  # neither critic nor eta
        return (FineTunedDiffusionPolicy if fine_tuned else DiffusionPolicy)(network=network, **plain)
    if issubclass(acts_as, FlowPolicy):
        settings = {k: facts[k] for facts in (node, sampling) for k in flow.SAMPLING if k in facts}
        sizes = {name: int(config[name]) for name in ("horizon_steps", "obs_dim", "action_dim")}
        return cls(network=network, **sizes, **settings)
    settings = {k: facts[k] for facts in (node, sampling) for k in GAUSSIAN_SAMPLING if k in facts}
    settings = getattr(cls, "EXPORT_SETTINGS", {}) | settings
    return acts_as(network=network, horizon_steps=int(node["horizon_steps"]), **settings)


def refuse_larger(node: Any, checkpoint: Checkpoint, path: Path) -> None:
    """Raises UserError where a described network is wider or deeper than the stored weights can be."""
    most = max(checkpoint.largest_dimension, LARGEST_SETTING), max(len(checkpoint.tensors), LARGEST_SETTING)
    for key, value in flatten(node if isinstance(node, Mapping) else {}).items():
        entries = value if isinstance(value, list) else [value]
        sizes = [entry for entry in entries if isinstance(entry, int | float) and not isinstance(entry, bool)]
        if len(entries) > most[1] or any(not abs(size) <= most[0] for size in sizes):
            raise UserError(f"{path}: its configuration has {key}={str(value)[:60]}, which does not fit its weights")


def normalizer_of(checkpoint: Checkpoint, config: Mapping[str, Any], path: Path) -> MinMaxNormalizer:
    """Returns the bounds in the checkpoint, else those of the file that the configuration names; none where it says
    that there are none: `normalization_path: null`, in an environment that is in [-1, 1] already."""
    obs_dim, action_dim = int(config["obs_dim"]), int(config["action_dim"])
    bounds = checkpoint.metadata.get("normalization")
    if not bounds:
        if "normalization_path" in config and config["normalization_path"] is None:
            return MinMaxNormalizer.unit(obs_dim, action_dim)
        if not config.get("normalization_path"):
            raise UserError(f"{path} says nothing of the normalization, nor has its configuration a normalization_path")
        bounds = MinMaxNormalizer.from_npz(config["normalization_path"], obs_dim, action_dim).as_lists()
    normalizer = MinMaxNormalizer(*(np.asarray(bounds[key], np.float32) for key in KEYS))
    if (normalizer.obs_dim, normalizer.action_dim) != (obs_dim, action_dim):
        raise UserError(
            f"{path}: its normalization is for obs_dim={normalizer.obs_dim}, action_dim={normalizer.action_dim}, "
            f"its configuration says {obs_dim} and {action_dim}"
        )
    return normalizer


# ---------- writing ----------


def require_free(target: Path, force: bool) -> None:
    """Refuses to replace what is there: an export only with `force`, anything else never."""
    if not target.exists():
        return
    ours = target.suffix == ".tflite" if target.is_file() else (target / "saved_model.pb").is_file()
    if not ours:
        raise UserError(f"{target} exists and is not an export: choose another --output")
    if not force:
        raise UserError(f"{target} exists: choose another --output, or add --force to replace it")


@contextlib.contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `target`, which is what it was until something is put in its place."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.writing-") as folder:
            yield Path(folder)
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"cannot write {target}: {reason}") from error


def write_saved_model(source: Source, folder: Path, batch: int | None) -> Path:
    """Writes both programs, under the names of `SIGNATURES`."""
    module = DeployedPolicy(source.policy, source.normalizer, source.cond_steps, source.act_steps, batch)
    programs = {name: getattr(module, attribute) for name, attribute in SIGNATURES.items()}
    tf.saved_model.save(module, str(folder), signatures=programs)
    return folder


def write_tflite(saved_model: Path, file: Path) -> Path:
    """Writes the programs for TFLite, with nothing but its own operations."""
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model), signature_keys=list(SIGNATURES))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    file.write_bytes(converter.convert())
    return file


def put_in_place(written: Path, target: Path) -> None:
    """Gives what was written its name; what had it goes."""
    if target.is_dir():
        target.replace(written.with_name("replaced"))
    written.replace(target)


# ---------- what was written, loaded again ----------


def load_saved_model(path: Path) -> Run:
    """Loads the programs of a SavedModel, by signature."""
    loaded = tf.saved_model.load(str(path))  # kept below: the programs' weights go with it

    def run(signature: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = loaded.signatures[signature](**{name: tf.constant(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    return run


def load_tflite(path: Path) -> Run:
    """Loads the programs of a TFLite model, by signature."""
    with without_stderr(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter will move to a package of its own
        interpreter = tf.lite.Interpreter(str(path))
        runners = {name: interpreter.get_signature_runner(name) for name in SIGNATURES}
    return lambda signature, inputs: runners[signature](**inputs)


def verify(source: Source, run: Run, batch: int | None) -> float:
    """Compares with the checkpoint's own policy on random observations and noise; returns the largest deviation.

    Raises:
        UserError: it is above `TOLERANCE`.
    """
    inputs = random_inputs(source, CHECKED, NoiseSource(0))
    expected = decide(source, inputs)
    bounds = source.normalizer
    scale = np.maximum(1.0, (bounds.action_max - bounds.action_min) / 2)
    deviation, done = 0.0, 0
    for size in [1] * CHECKED if batch == 1 else [1, 3, CHECKED - 4]:
        rows = range(done, done + size)
        part = rows_of(source, inputs, rows)
        outputs = run("with_noise", part)
        own = run("serving_default", {name: part[name] for name in part if name in ("state", "rgb")})
        if own["plan"].shape != outputs["plan"].shape or not np.isfinite(own["plan"]).all():
            raise UserError("the exported policy gives no proper actions from its own noise; nothing was written")
        first = expected[rows, : source.act_steps]
        errors = [np.abs(outputs["plan"] - expected[rows]) / scale, np.abs(outputs["actions"] - first) / scale]
        deviation = max(deviation, *(float(error.max()) for error in errors))
        done += size
    if not deviation <= TOLERANCE:
        raise UserError(
            f"the exported policy acts otherwise than the checkpoint, by {deviation:.1e} (at most {TOLERANCE}); "
            "nothing was written"
        )
    return deviation


def decide(source: Source, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns actions [B,H,A] in the units of the environment, by the checkpoint's policy, outside of any compiled
    program."""
    noise = {name: tf.constant(inputs[name]) for name in noise_shapes(source.policy, None)}
    cond = {name: tf.constant(value) for name, value in inputs.items() if name not in noise}
    cond["state"] = tf.constant(source.normalizer.normalize_obs(inputs["state"]))
    return source.normalizer.unnormalize_action(deterministic_plan(source.policy, cond, noise).numpy())


def input_shapes(source: Source, batch: int | None) -> dict[str, tuple[int | None, ...]]:
    """Returns the shapes of all inputs, by name."""
    observation = observation_shapes(source.policy, source.normalizer.obs_dim, source.cond_steps, batch)
    return observation | noise_shapes(source.policy, batch)


def random_inputs(source: Source, batch: int, rng: Rng) -> dict[str, np.ndarray]:
    """Returns observations within the bounds of the data, any images, and the noise of one decision."""
    low, high = source.normalizer.obs_min, source.normalizer.obs_max
    draws: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
        "state": lambda shape: (low + (high - low) * rng.uniform(shape)).astype(np.float32),
        "rgb": lambda shape: rng.integers(0, 256, shape).astype(np.uint8),
        "noise": rng.normal,
        "uniform": rng.uniform,
    }
    return {name: draws[name](shape) for name, shape in input_shapes(source, batch).items()}  # type: ignore[arg-type]


def rows_of(source: Source, inputs: Mapping[str, np.ndarray], rows: range) -> dict[str, np.ndarray]:
    """Returns those rows of a batch, wherever its axis is."""
    axes = {name: shape.index(None) for name, shape in input_shapes(source, None).items()}
    return {name: np.take(value, rows, axis=axes[name]) for name, value in inputs.items()}


def latency(source: Source, run: Run) -> np.ndarray:
    """Measures the seconds [TIMED] of decisions at batch 1, the noise included."""
    inputs = random_inputs(source, 1, NoiseSource(1))
    observation = {name: inputs[name] for name in inputs if name in ("state", "rgb")}
    seconds = []
    for _ in range(WARM_UP + TIMED):
        began = time.perf_counter()
        run("serving_default", observation)
        seconds.append(time.perf_counter() - began)
    return np.array(seconds[WARM_UP:])
