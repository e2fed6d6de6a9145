"""Speed of this repository beside the PyTorch reference, turn by turn in one run.

    python benchmarks/run.py                                   # beside this repository's PyTorch twins
    python benchmarks/run.py --upstream PATH                   # beside a checkout of the authors' code
    python benchmarks/run.py --upstream PATH --upstream-python PYTHON     # with their simulators and whole iterations
    python benchmarks/run.py --upstream PATH --networks                   # the other networks instead
    python benchmarks/run.py --upstream PATH --algorithms                 # updates of the algorithms with a buffer
    python benchmarks/run.py --upstream-diffuser PATH                     # Diffuser beside a checkout of its authors'
    python benchmarks/run.py --upstream-lite PATH                         # DiffuserLite beside its authors' code
    python benchmarks/run.py --upstream-reinflow PATH [--upstream-python PYTHON]    # ReinFlow beside its authors' code

Prints a Markdown table of medians and ratios. benchmarks/README.md explains the rows and how to run the reference.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import algorithms
import flows
import iteration
import lite
import machine
import networks
import planners
import workloads
from worker import Side, Sides
from workloads import Row, our_flops, reference_flops

ROWS = workloads.ROWS | networks.rows() | algorithms.rows() | planners.rows() | lite.rows() | flows.rows()
# options that name checkouts of other authors' code: their rows, and the modules of both sides
OTHERS = {
    "upstream_diffuser": (planners.rows, "planners"),
    "upstream_lite": (lite.rows, "lite"),
    "upstream_reinflow": (flows.rows, "flows"),
}
HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data" / "gym" / "hopper-medium-v2"
TORCH_THREADS = (1, 2)[: machine.describe()["cores"]]
GEMM_TURNS = 5
BUSY = 0.5


def main() -> int:
    options = _options()
    if machine.load() > BUSY:
        print(f"note: the machine is busy (load {machine.load():.1f}), timings will be off", file=sys.stderr)
    results: dict[str, Any] = {"command": _command(options)}
    upstream = any((options.upstream, *(getattr(options, name) for name in OTHERS)))
    results |= {"machine": machine.describe(), "upstream": upstream, "rows": {}}
    results["load_before"] = machine.load()
    wanted = options.rows or _selection(options)
    reference, ours = _sides(options, any(name in algorithms.rows() for name in wanted))
    try:
        results["about"] = {"reference": reference.ask("about"), "ours": ours.ask("about")}
        results["gemm"] = _gemm(reference, 2 if options.quick else GEMM_TURNS)
        for name in (n for n in ROWS if n in wanted):
            results["rows"][name] = _compare(ROWS[name], reference, ours, options.quick)
            print(f"  {name}: {_cells(results['rows'][name])}", file=sys.stderr, flush=True)
    finally:
        reference.close()
        ours.close()
    if "iteration" in wanted:
        results["iteration"] = _iterations(options)
    table = markdown(results)
    print(table)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    if options.readme:
        insert(options.readme, table)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, metavar="PATH", help="checkout of the authors' DPPO")
    parser.add_argument("--upstream-python", metavar="PYTHON", help="interpreter that has the reference's simulators")
    parser.add_argument("--networks", action="store_true", help="U-Nets, networks that see, transformers, Gaussians")
    parser.add_argument("--algorithms", action="store_true", help="updates of the algorithms with a replay buffer")
    parser.add_argument("--upstream-diffuser", type=Path, metavar="PATH", help="checkout of the authors' Diffuser")
    parser.add_argument("--upstream-lite", type=Path, metavar="PATH", help="checkout of the authors' DiffuserLite")
    parser.add_argument("--upstream-reinflow", type=Path, metavar="PATH", help="checkout of the authors' ReinFlow")
    parser.add_argument("--bfloat16", action="store_true", help="our updates with train.precision=bfloat16")
    parser.add_argument("--quick", action="store_true", help="few turns: to see that it works")
    parser.add_argument(
        "--rows", nargs="+", choices=[*ROWS, "iteration"], metavar="ROW", help=f"of {[*ROWS]}, iteration"
    )
    parser.add_argument("--policy", type=Path, metavar="FILE.pt", help="pre-trained policy for whole iterations")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with train.npz and normalization.npz")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="every measurement, e.g. in benchmarks/results/"
    )
    parser.add_argument("--readme", type=Path, metavar="FILE.md", help="put the table between this file's markers")
    options = parser.parse_args()
    for name in ("upstream", *OTHERS, "policy", "data"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            parser.error(f"--{name}: {path} does not exist")
        setattr(options, name, path.resolve() if path else None)
    if options.upstream_python and not (options.upstream or options.upstream_reinflow):
        parser.error("--upstream-python needs --upstream or --upstream-reinflow")
    return options


def _command(options: argparse.Namespace) -> str:
    """The command line that was given, with placeholders for this machine's paths."""
    words = ["python", "benchmarks/run.py"]
    words += ["--upstream", "PATH"] * bool(options.upstream) + ["--upstream-python", "PYTHON"] * bool(
        options.upstream_python
    )
    for name in OTHERS:
        words += [f"--{name.replace('_', '-')}", "PATH"] * bool(getattr(options, name))
    words += ["--networks"] * options.networks + ["--algorithms"] * options.algorithms
    words += ["--bfloat16"] * options.bfloat16 + ["--quick"] * options.quick
    words += ["--rows", *options.rows] if options.rows else []
    return shlex.join(words)


def _selection(options: argparse.Namespace) -> list[str]:
    for name, (rows, _) in OTHERS.items():
        if getattr(options, name):
            return [*rows(), *(["iteration"] if options.upstream_python else ())]
    if options.networks or options.algorithms:
        return [*(networks.rows() if options.networks else ()), *(algorithms.rows() if options.algorithms else ())]
    return [*workloads.ROWS, "iteration"]


def _sides(options: argparse.Namespace, with_algorithms: bool) -> tuple[Side, Side | Sides]:
    for name, (_, side) in OTHERS.items():
        if checkout := getattr(options, name):
            reference = Side(sys.executable, HERE / f"reference_{side}.py", [str(checkout)])
            return reference, Side(sys.executable, HERE / f"our_{side}.py", [])
    arguments = ["--upstream", str(options.upstream), "--data", str(options.data)] if options.upstream else []
    if with_algorithms:
        file = Path(tempfile.mkdtemp()) / "algorithms.json"
        subprocess.run([sys.executable, HERE / "ours.py", "--write-algorithms", file], check=True)
        arguments = [*arguments, "--algorithms", str(file)]
    python = options.upstream_python or sys.executable
    halves = ["--bfloat16"] * options.bfloat16
    reference, ours = Side(python, HERE / "reference.py", arguments), Side(sys.executable, HERE / "ours.py", halves)
    if not with_algorithms:
        return reference, ours
    sharing = Side(sys.executable, HERE / "ours.py", ["--shared-operations", *halves])
    shared = [f"{name} updates" for name, case in algorithms.CASES.items() if not case.side_by_side]
    return reference, Sides(ours, sharing, shared)


# ---------- measuring ----------


def _gemm(reference: Side, turns: int) -> dict[str, float]:
    """Each framework's rate for float32 matrix products, 1e9 operations a second, with its better thread count."""
    plain = Side(sys.executable, HERE / "ours.py", ["--default-threads"])  # every core on one product, as TF comes
    rates: dict[str, list[float]] = {"reference": [], "ours": []}
    for _ in range(turns):
        rates["reference"].append(max(reference.ask("gemm", threads=t).get("gflops", 0.0) for t in TORCH_THREADS))
        rates["ours"].append(plain.ask("gemm").get("gflops", 0.0))
    plain.close()
    return {side: statistics.median(values) for side, values in rates.items()}


def _better_threads(side: Side, workload: str, calls: int) -> int | None:
    """The thread count with which torch is faster at this, or None if it cannot run."""
    times = {}
    for threads in TORCH_THREADS:
        answer = side.ask(workload, max(2, calls // 4), threads)
        if "seconds" not in answer:
            return None
        times[threads] = min(answer["seconds"])
    return min(times, key=lambda t: times[t])


def _compare(row: Row, reference: Side, ours: Side | Sides, quick: bool) -> dict[str, Any]:
    """Measure both sides in turn; the ratio is the median over the turns."""
    threads = _better_threads(reference, row.reference, row.calls) if row.reference else None
    sides: dict[str, Any] = {"reference": {"turns": [], "threads": threads}, "ours": {"turns": []}}
    for _ in range(2 if quick else row.turns):
        for name, side, workload in (("reference", reference, row.reference), ("ours", ours, row.ours)):
            answer = side.ask(workload, row.calls, threads if name == "reference" else None) if workload else {}
            if "seconds" in answer:
                sides[name]["turns"].append(answer["seconds"])
                sides[name].setdefault("cpu", []).append(statistics.median(answer["cpu_seconds"]))
            else:
                sides[name]["unavailable"] = answer.get("unavailable", "")
    for side in sides.values():
        medians = [statistics.median(turn) for turn in side["turns"]]
        side["median"] = statistics.median(medians) if medians else None
    pairs = list(zip(sides["reference"]["turns"], sides["ours"]["turns"], strict=False))
    ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    if ratios:
        sides |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    return {"title": row.title, **sides}


def _iterations(options: argparse.Namespace) -> dict[str, Any]:
    turns = 1 if options.quick else 3
    agent = iteration.REINFLOW if options.upstream_reinflow else iteration.DPPO
    upstream = options.upstream_reinflow or options.upstream
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = options.policy or folder / "policy.pt"
        if options.policy is None:
            subprocess.run([sys.executable, HERE / "ours.py", "--write-policy", policy, agent.config], check=True)
        precision = "bfloat16" if options.bfloat16 else "float32"
        starts = {"ours": lambda: iteration.our_run(agent, policy, folder, turns + 2, precision)}
        if upstream and options.upstream_python:
            facts = (agent, upstream, options.upstream_python, policy, options.data, folder)
            starts = {"reference": lambda: iteration.reference_run(*facts, turns + 2)} | starts
        try:
            return iteration.compare(starts, turns)
        except RuntimeError as error:
            print(f"whole iterations: {error}", file=sys.stderr)
            return {"unavailable": str(error)}


# ---------- showing ----------


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _cells(row: dict[str, Any]) -> str:
    low, high = row.get("ratio_range", (0, 0))
    ratio = f"**{row['ratio']:.1f}x** ({low:.1f} to {high:.1f})" if "ratio" in row else "–"
    return f"{_time(row['reference']['median'])} | {_time(row['ours']['median'])} | {ratio}"


def markdown(results: dict[str, Any]) -> str:
    """The table and what one needs to read it."""
    name = "PyTorch reference" if results["upstream"] else "our PyTorch twins"
    lines = [f"| | {name} | this repository | ratio (range) |", "|---|---|---|---|"]
    lines += [f"| {row['title']} | {_cells(row)} |" for row in results["rows"].values()]
    run = results.get("iteration", {})
    if "seconds" in run:
        medians = {side: statistics.median(values) for side, values in run["seconds"].items()}
        ratio = f"**{run['ratio']:.1f}x**" if "ratio" in run else "–"
        title = "a whole iteration: 40 x 500 chunk steps, 5 epochs"
        lines.append(f"| {title} | {_time(medians.get('reference'))} | {_time(medians['ours'])} | {ratio} |")
        memory = {side: f"{gb:.1f} GB" if gb else "–" for side, gb in run["peak_memory_gb"].items()}
        lines.append(f"| its peak memory (main process) | {memory.get('reference', '–')} | {memory['ours']} | |")
    gemm = results["gemm"]
    lines.append(f"| own float32 matrix product | {gemm['reference']:.0f} GFLOP/s | {gemm['ours']:.0f} GFLOP/s | |")
    lines += [_share(results), "", *_footer(results)]
    return "\n".join(line for line in lines if line is not None)


def _share(results: dict[str, Any]) -> str | None:
    row = results["rows"].get("minibatch")
    if row is None:
        return None
    cells = []
    for side, flops in (("reference", reference_flops()), ("ours", our_flops())):
        median, rate = row[side]["median"], results["gemm"][side]
        cells.append(f"{flops / median / (rate * 1e9):.0%} of {flops / 1e9:.0f} GFLOP" if median and rate else "–")
    return f"| PPO minibatch, share of that rate | {cells[0]} | {cells[1]} | |"


def _footer(results: dict[str, Any]) -> list[str]:
    missing = {
        side["unavailable"]
        for row in results["rows"].values()
        for side in (row["reference"], row["ours"])
        if side.get("unavailable")
    }
    versions = [results["about"][side].get("about", "") for side in ("ours", "reference")]
    return [
        f"{machine.sentence(results['machine'])}; {'; '.join(v for v in versions if v)}.",
        f"Medians of alternating turns, torch with its better thread count. `{results['command']}`",
        *sorted(f"Not measured: {reason}." for reason in missing),
    ]


def insert(path: Path, table: str, name: str = "benchmark") -> None:
    """Replace what is between the markers `name` of `path` (the second one is added if it is not there yet)."""
    begin, end = f"<!-- table:{name} -->", f"<!-- end:{name} -->"
    before, marker, after = path.read_text().partition(begin)
    if not marker:
        raise SystemExit(f"{path} has no line {begin}")
    rest = after.partition(end)[2] if end in after else after
    path.write_text(f"{before}{begin}\n{table}\n{end}{rest}")


if __name__ == "__main__":
    sys.exit(main())
