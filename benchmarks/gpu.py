"""The steps of gpu.sh, each a process of its own: what a GPU computes, how exactly, and how fast.

    python benchmarks/gpu.py STEP FOLDER [--cpu] [--tf32] [--precision float32|bfloat16]

    about     versions, the GPU, whether its memory grows on demand
    exact     what `parity` compares with, in float64 on the processor
    parity    float32 on the GPU: recordings of the PyTorch code, and the same weights as `exact`
    rows      rows of the benchmark in TensorFlow
    twins     the same in PyTorch, if it has CUDA (the twins of parity_tests/reference)
    report    all of it as Markdown and as FOLDER/gpu.json

Every step writes FOLDER/STEP….json. With --cpu everything is computed on the processor, in small sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "code"), str(ROOT)]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402
import ours  # noqa: E402
import planners  # noqa: E402
import workloads as w  # noqa: E402
from worker import Workload  # noqa: E402

PACKAGES = ("tensorflow", "tf_keras", "torch", "numpy", "nvidia-cudnn-cu12", "nvidia-cublas-cu12")
SECONDS, FEWEST, MOST = 2.0, 3, 50  # of measured calls
RECORDINGS = (  # of networks, samplers and losses, by the names of their files
    *("net_diffusion_mlp_res", "net_flow_mlp_res", "net_shortcut_mlp_add", "net_unet1d_base", "critic_obs_res"),
    *("net_gaussian_mlp_learned", "net_gmm_mlp_learnfixed", "net_gaussian_transformer_learned"),
    *("net_vit_embed2", "net_vision_diffusion_mlp_1img", "net_vision_unet1d_1img", "critic_vit_1img"),
    *("df_unet_other_horizon", "df_value_outdim", "dl_dit_d16_cond1"),
    *("vpg_forward_ddpm_ft4of8", "vpg_forward_ddim", "vpg_get_logprobs_ddpm", "ppoflow_get_logprobs_k4"),
    *("ppo_diffusion_loss_base", "ppo_diffusion_loss_unet", "ppo_diffusion_loss_vision", "ppo_gaussian_loss_base"),
    *("diffusion_loss_eps", "idql_loss_actor", "sac_loss_critic"),
)
FEW = RECORDINGS[:2]  # with --cpu


class Sizes(NamedTuple):
    """What is computed: environments, samples of a rollout, rows of a minibatch, the planner's task."""

    envs: int
    samples: int
    minibatch: int
    task: str
    guided: bool


WHOLE = Sizes(w.ENVS, w.SAMPLES, w.MINIBATCH, "hopper", True)
SMALL = Sizes(4, 50, 100, "halfcheetah", False)


def sizes(options: argparse.Namespace) -> Sizes:
    """The default ones, or those that a processor computes in seconds."""
    return SMALL if options.cpu else WHOLE


def start(options: argparse.Namespace) -> Any:
    """Starts TensorFlow on its device as a run does, its memory growing on demand; TF32 as the options say."""
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import tensorflow as tf

    from diffusion_rl.cli.app import _select_device
    from diffusion_rl.core.threads import configure_threads

    _select_device("cpu" if options.cpu else "cuda:0")
    configure_threads()
    tf.config.experimental.enable_tensor_float_32_execution(options.tf32)
    if not options.cpu and not tf.config.list_logical_devices("GPU"):
        raise SystemExit("TensorFlow sees no GPU here; --cpu computes small sizes on the processor")
    return tf


def write(options: argparse.Namespace, name: str, result: Mapping[str, Any]) -> None:
    """Writes a step's result, and prints it."""
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def named(options: argparse.Namespace, step: str) -> str:
    """The step with what distinguishes its variants."""
    return f"{step}_{options.precision}" + "_tf32" * options.tf32


# ---------- what there is ----------


def installed() -> dict[str, str]:
    """Versions of the packages that matter, of those that are there."""
    there = {}
    for name in PACKAGES:
        try:
            there[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return there


def about(options: argparse.Namespace) -> None:
    """Versions, device, and whether memory grows."""
    tf = start(options)
    built = tf.sysconfig.get_build_info()
    result: dict[str, Any] = {"python": platform.python_version(), "packages": installed()}
    result |= {key: built[key] for key in ("cuda_version", "cudnn_version") if key in built}
    gpus = tf.config.get_visible_devices("GPU")
    result["device"] = tf.config.experimental.get_device_details(gpus[0]).get("device_name") if gpus else "processor"
    result["memory_growth"] = bool(tf.config.experimental.get_memory_growth(gpus[0])) if gpus else None
    write(options, "about", result)


# ---------- how exact ----------


def computed(options: argparse.Namespace, dtype: str) -> dict[str, np.ndarray]:
    """The main computations in a precision, arrays by name; weights are drawn in float32 always."""
    from diffusion_rl.core.keras import precision
    from diffusion_rl.core.noise import NoiseSource, initial_weights
    from diffusion_rl.interop.torch_names import load_state_dict, state_dict

    size = sizes(options)
    results: dict[str, np.ndarray] = {}
    models: list[Any] = []
    for each in dict.fromkeys(("float32", dtype)):
        ours.fine_tuning.cache_clear()
        with precision(each), initial_weights(NoiseSource(0)):
            models.append((ours.fine_tuning()[1], planner(size)))
    (first, (_, drawn)), (trainer, (planning, modules)) = models[0], models[-1]
    for module, other in zip((trainer.policy, *modules), (first.policy, *drawn), strict=True):
        load_state_dict(module, state_dict(other))
    with precision(dtype):
        rollout, actor = w.rollout(samples=size.samples), trainer.actor
        noise = NoiseSource(1).normal(actor.noise_shape(size.envs), np.float32)
        decision = actor.act(rollout.state[: size.envs], noise, deterministic=False)
        results |= {"DPPO: chunks": decision.actions, "DPPO: log-probabilities": decision.log_probs}
        results["DPPO: values"] = trainer.values(rollout.state)
        old = actor.log_probs(rollout.state, rollout.chains)
        results["DPPO: log-probabilities of chains"] = old
        count = trainer.load(rollout.state, rollout.chains, rollout.returns, rollout.values, rollout.advantages, old)
        losses = trainer.minibatch(NoiseSource(2).permutation(count)[: size.minibatch], True, 0)
        results["DPPO: policy loss"] = np.array(losses["pg_loss"])
        results["DPPO: value loss"] = np.array(losses["v_loss"])
        case = planners.CASES[size.task]
        results["Diffuser: plans"] = _plans(planning, case)
    return results


def planner(size: Sizes) -> tuple[Any, tuple[Any, Any]]:
    """Diffuser for the task, and its networks."""
    import our_planners as p

    from diffusion_rl.diffusion.guidance import Guide
    from diffusion_rl.methods.diffuser.model import Diffuser

    case = planners.CASES[size.task]
    diffusion, value = p.models(case)
    guide = Guide(value.value, case.scale, planners.GUIDE_STEPS, case.t_stopgrad) if size.guided else None
    made = Diffuser(diffusion, p.dataset(case, None).normalizers, guide, planners.SAMPLES)
    return made, (diffusion.model, value.model)


def _plans(planning: Any, case: planners.Case) -> np.ndarray:
    from diffusion_rl.core.noise import NoiseSource

    plan = planning.act({0: planners.numbers(1, case.observation_dim)}, planning.draw(NoiseSource(3), 1))
    return plan.observations


def exact(options: argparse.Namespace) -> None:
    """Computes in float64 on the processor and keeps the arrays."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    options.folder.mkdir(parents=True, exist_ok=True)
    np.savez(options.folder / "exact.npz", **computed(options, "float64"))  # type: ignore[arg-type]


def parity(options: argparse.Namespace) -> None:
    """Compares the device's float32 with recordings and with `exact`; a line of numbers for each."""
    start(options)
    result: dict[str, Any] = {"tf32": options.tf32, "recordings": recordings(FEW if options.cpu else RECORDINGS)}
    theirs = np.load(options.folder / "exact.npz")
    result["exact"] = {
        name: deviation(array, theirs[name], 1.0 if "policy loss" in name else 0.0)  # nearly zero: a sum of both signs
        for name, array in computed(options, "float32").items()
    }
    write(options, named(options, "parity"), result)


def deviation(found: np.ndarray, wanted: np.ndarray, least: float = 0.0) -> float:
    """The largest difference of two arrays [...] over the second's largest magnitude, at least `least`."""
    scale = max(float(np.abs(wanted).max()), least, 1e-12)
    return float(np.abs(np.asarray(found, np.float64) - wanted).max() / scale)


def recordings(names: Sequence[str]) -> dict[str, Any]:
    """By name of a recording: its worst deviation in float32, that gate, and whether all were within theirs."""
    from parity_tests.replay import compare
    from parity_tests.replay.dispatch import replay
    from parity_tests.replay.files import GOLDENS

    results: dict[str, Any] = {}
    for name in names:
        compare.DEVIATIONS.clear()
        failed = ""
        try:
            replay(GOLDENS / f"{name}.npz")
        except Exception as error:  # told below; the others are replayed
            failed = f"{type(error).__name__}: {error}".splitlines()[0]
        single = [each for each in compare.DEVIATIONS if each.dtype == "float32"]
        worst = max(single, key=lambda each: each.deviation / each.gate, default=None)
        numbers = {"deviation": worst.deviation, "gate": worst.gate} if worst else {}
        results[name] = {**numbers, "failed": failed}
    return results


# ---------- how fast ----------


def timed(workload: Workload) -> dict[str, float]:
    """Seconds on the clock of the first call, which compiles, and the median of more."""
    began = time.perf_counter()
    workload()
    first, used = time.perf_counter() - began, list[float]()
    workload()
    while len(used) < FEWEST or (len(used) < MOST and sum(used) < SECONDS):
        began = time.perf_counter()
        workload()
        used.append(time.perf_counter() - began)
    return {"first": first, "seconds": statistics.median(used)}


def measured(makers: Mapping[str, Callable[[], Workload]], peak: Callable[[], float | None]) -> dict[str, Any]:
    """Times of each workload, and GB of the device's memory at the most; a failure is told in the place of times."""
    results: dict[str, Any] = {}
    for name, make in makers.items():
        try:
            results[name] = timed(make()) | {"peak_gb": peak()}
        except Exception as error:  # the other rows go on
            results[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    return results


def rows(options: argparse.Namespace) -> None:
    """Measures TensorFlow, and leaves the planner's weights for `twins`."""
    tf = start(options)
    size, half = sizes(options), [f"++train.precision={options.precision}"]

    def peak() -> float | None:
        if options.cpu:
            return None
        used = tf.config.experimental.get_memory_info("GPU:0")["peak"] / 1e9
        tf.config.experimental.reset_memory_stats("GPU:0")
        return used

    def plan() -> Workload:
        from diffusion_rl.core.noise import NoiseSource
        from diffusion_rl.interop.torch_names import state_dict

        made, modules = planner(size)
        for name, module in zip(("unet", "value"), modules, strict=True):
            np.savez(options.folder / f"{name}.npz", **state_dict(module))  # type: ignore[arg-type]
        noise = NoiseSource(0)
        seen = {0: planners.numbers(1, planners.CASES[size.task].observation_dim)}
        return lambda: made.act(seen, made.draw(noise, 1))

    options.folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Workload]] = {
        f"sampling, {size.envs} environments": lambda: ours.sampling(size.envs),
        f"PPO minibatch, {size.minibatch} rows": lambda: ours.minibatch(size.minibatch, size.samples, half),
        "pre-training, 10 steps of 128": lambda: ours.pretraining(*half),
    }
    if options.precision == "float32":  # the other precision is of training alone
        makers[_plan_name(size)] = plan
    else:
        del makers[next(iter(makers))]
    result = measured(makers, peak)
    write(options, named(options, "rows"), {"rows": result, "precision": options.precision, "tf32": options.tf32})


def _plan_name(size: Sizes) -> str:
    return f"Diffuser, a {'guided' * size.guided or 'plain'} decision, {size.task}"


def twins(options: argparse.Namespace) -> None:
    """Measures PyTorch, without TF32 (its default) or with it."""
    try:
        import torch
    except ImportError:
        return write(options, named(options, "twins"), {"missing": "no PyTorch here"})
    if not options.cpu and not torch.cuda.is_available():
        return write(options, named(options, "twins"), {"missing": "this PyTorch has no CUDA"})
    from torch_rows import makers

    torch.set_default_device("cpu" if options.cpu else "cuda")
    if options.cpu:
        torch.set_num_threads(1)  # several wait for each other where the machine is busy
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    size = sizes(options)

    def peak() -> float | None:
        if options.cpu:
            return None
        used = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return used

    names = (f"sampling, {size.envs} environments", f"PPO minibatch, {size.minibatch} rows")
    names = (*names, "pre-training, 10 steps of 128", _plan_name(size))
    made = makers(size.envs, size.samples, size.minibatch, size.task, size.guided, options.folder)
    result = measured(dict(zip(names, made, strict=True)), peak)
    write(options, named(options, "twins"), {"rows": result, "precision": "float32", "tf32": options.tf32})


# ---------- report ----------


def report(options: argparse.Namespace) -> None:
    """Joins what the steps left, and prints it."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))}
    found.pop("gpu", None)
    (options.folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    text = markdown(found, options.folder)
    (options.folder / "gpu.md").write_text(text + "\n")
    print(text)


def markdown(found: Mapping[str, Any], folder: Path) -> str:
    """What was found, as Markdown."""
    facts = found.get("about", {})
    packages = ", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items())
    device = (folder / "nvidia-smi.txt").read_text().strip() if (folder / "nvidia-smi.txt").is_file() else ""
    growth = {True: "memory grows on demand", False: "**memory does not grow**"}.get(facts.get("memory_growth"), "")
    lines = [
        "## Device",
        "",
        "; ".join(part for part in (device or facts.get("device", "?"), packages, growth) if part),
    ]
    lines += ["", "## Exactness in float32", "", *_parity_table(found)]
    return "\n".join([*lines, "", "## Speed", "", *_speed_table(found)])


def _parity_table(found: Mapping[str, Any]) -> list[str]:
    plain, fast = (found.get(f"parity_float32{tail}", {}) for tail in ("", "_tf32"))
    lines = ["| | TF32 off | gate | TF32 on |", "|---|---|---|---|"]
    for name, one in plain.get("recordings", {}).items():
        other = fast.get("recordings", {}).get(name, {})
        worst = _number(one.get("deviation")) + (" **beyond its gate**" if one["failed"] else "")
        lines.append(f"| {name} | {worst} | {_number(one.get('gate'))} | {_number(other.get('deviation'))} |")
    for name, value in plain.get("exact", {}).items():
        other = fast.get("exact", {}).get(name)
        lines.append(f"| {name}, of float64 on the processor | {_number(value)} | | {_number(other)} |")
    return lines


def _speed_table(found: Mapping[str, Any]) -> list[str]:
    columns = {
        "TensorFlow": "rows_float32",
        "with TF32": "rows_float32_tf32",
        "with bfloat16": "rows_bfloat16",
        "PyTorch twins": "twins_float32",
        "PyTorch with TF32": "twins_float32_tf32",
    }
    there = {title: found[step] for title, step in columns.items() if "rows" in found.get(step, {})}
    lines = [f"| ms (first call, s; peak memory, GB) | {' | '.join(there)} |", "|---" * (len(there) + 1) + "|"]
    for name in dict.fromkeys(name for step in there.values() for name in step["rows"]):
        lines.append(f"| {name} | {' | '.join(_cell(step['rows'].get(name)) for step in there.values())} |")
    missing = {step["missing"] for step in found.values() if "missing" in step}
    return [*lines, *(f"\nNot measured: {reason}." for reason in sorted(missing))]


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "failed" in row:
        return row["failed"]
    memory = "" if row["peak_gb"] is None else f"; {row['peak_gb']:.2f}"
    return f"{row['seconds'] * 1e3:.3g} ({row['first']:.1f}{memory})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


STEPS = {step.__name__: step for step in (about, exact, parity, rows, twins, report)}


def main() -> int:
    """Makes one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for results")
    parser.add_argument("--cpu", action="store_true", help="small sizes on the processor: to see that it works")
    parser.add_argument("--tf32", action="store_true", help="products of 19 bits, which GPUs since Ampere have")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="train.precision")
    options = parser.parse_args()
    STEPS[options.step](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
