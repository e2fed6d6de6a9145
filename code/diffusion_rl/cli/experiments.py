"""Experiments: a YAML file describes a grid of runs, which are started a few at a time and watched.

    meta_data: {exp_name, script_path, num_workers, [job_name]}
    variables: names -> lists of values (nested as the constants are; may be empty)
    constants: everything else that a run is given

Each combination of values is a variant, a YAML file of its own that `script_path` is started with. Whatever the script,
its output goes into a file beside the variant.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import itertools
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from diffusion_rl.cli.variants import HYDRA_OPTIONS, append_to_name, as_flags, as_overrides, flat, folder_of
from diffusion_rl.cluster.launch import PLACES, Process, launched
from diffusion_rl.config.overrides import experiment_arguments, gpu_number, read_spec
from diffusion_rl.config.schema import FILE, check_ranges, require_inside, whole
from diffusion_rl.config.yaml_files import write_yaml
from diffusion_rl.core.errors import Interrupted, UserError
from diffusion_rl.core.files import read_json, write_json
from diffusion_rl.core.places import here_or_shipped, output_folder
from diffusion_rl.reports.progress import duration
from diffusion_rl.training import signals
from diffusion_rl.training.locks import child_lock, locked

LINE_SECONDS = 10.0  # between lines about what is running, where there is no terminal
STOP_SECONDS = 15.0  # that a child has to save its state before it is killed
MOST_RUNS = 10_000  # of a grid
HELP = """\
The file has three parts:
  meta_data                what is started
    exp_name               name of the experiment, and part of the folders' names
    script_path            the script: train.py, script/run.py, one of scripts/, or another one
    num_workers            runs at a time (default 1)
    job_name               train.py: name of a run, from {keys} of its values
    arguments              file (-e FILE -g GPU), hydra (key=value) or flags (--key value); needed for scripts of yours
  variables                keys with lists of values; every combination is a run
  constants                keys of all runs; --help of the script lists them"""


# ---------- the grid ----------


def variants(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns constants, values of one combination of the variables, meta_data and `exp_id`, for each combination.

    The variable that was named last changes fastest; a variable overrides the constant of its name.
    """
    if unknown := [key for key in spec if key not in ("meta_data", "variables", "constants")]:
        raise UserError(f"{unknown[0]}: an experiment has meta_data, variables and constants only")
    meta, variables, constants = (spec.get(key) or {} for key in ("meta_data", "variables", "constants"))
    for name, group in (("meta_data", meta), ("variables", variables), ("constants", constants)):
        if not isinstance(group, Mapping):
            raise UserError(f"{name} must be a mapping of keys to values")
    for key in ("exp_name", "script_path"):
        if meta.get(key) in (None, ""):
            raise UserError(f"meta_data needs {key}")
    meta = {**meta, "script_path": str(here_or_shipped(str(meta["script_path"])))}
    require_inside(str(meta["exp_name"]), f"exp_name: {meta['exp_name']}")
    check_ranges({"num_workers": meta.get("num_workers") or 1}, {"num_workers": whole(1, 1000)}, FILE)
    variables = dict(flat(variables))
    for key, values in variables.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"variables: {key} must be a list of at least one value")
    if (count := math.prod(map(len, variables.values()))) > MOST_RUNS:
        raise UserError(f"these variables make {count} runs: {MOST_RUNS} are allowed, so give fewer values")
    combined = []
    for i, combination in enumerate(itertools.product(*variables.values())):
        variant = copy.deepcopy(dict(constants))
        for key, value in zip(variables, combination, strict=True):
            _put(variant, key, copy.deepcopy(value))
        combined.append({**variant, **copy.deepcopy(dict(meta)), "exp_id": i})
    return combined


def _put(variant: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        variant = variant.setdefault(group, {})
        if not isinstance(variant, dict):
            raise UserError(f"variables: {key}: {group} is a value among the constants, not a group")
    variant[last] = value


def flat_variant(spec: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a variant's file as it is, or a specification of a single run."""
    if "constants" not in spec and "meta_data" not in spec:
        return dict(spec)
    runs = variants(spec)
    if len(runs) > 1:
        raise UserError(f"{name} describes {len(runs)} runs: start it with python run_experiment.py -e {name}")
    return runs[0]


# ---------- one run ----------


@dataclass
class Job:
    """A variant and what became of it: `status` is the exit status, None while there is none."""

    variant: Path
    command: list[str]
    status: int | None = None
    seconds: float = 0.0
    process: Process | None = None
    began: float = field(default=0.0)

    @property
    def log(self) -> Path:
        return self.variant.with_suffix(".log")

    def start(self, environment: Mapping[str, str], place: str = "here") -> bool:
        """Starts it, here as a process that ends with this one; False while that of an earlier launch still runs.

        Args:
            place: one of `cluster.launch.PLACES`.
        """
        if place != "here":
            self.began = time.monotonic()
            self.process = launched(place, self.command, self.log)
            return True
        lock = child_lock(self.variant.with_suffix(".lock"))
        if lock is None:
            return False
        self.began = time.monotonic()
        with self.log.open("ab") as output, lock:
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                pass_fds=[lock.fileno()],  # the lock is the child's from here on
                preexec_fn=signals.end_with_parent(),
            )
        return True

    def poll(self) -> bool:
        """Returns whether it has ended by now."""
        assert self.process is not None
        self.status, self.seconds = self.process.poll(), time.monotonic() - self.began
        return self.status is not None

    def last_line(self) -> str:
        """Returns the newest line of its output."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4000))
            lines = [line for line in re.split(rb"[\r\n]+", file.read()) if line.strip()]
        return lines[-1].decode(errors="replace").strip() if lines else ""

    def share(self) -> float:
        """Returns how far it says it is: the last "n/N" of its output."""
        if self.status is not None:
            return 1.0
        counts = re.findall(r"(\d+)/(\d+)", self.last_line())
        return min(int(counts[-1][0]) / max(int(counts[-1][1]), 1), 1.0) if counts else 0.0


def command_of(variant: Mapping[str, Any], path: Path, gpu: str) -> list[str]:
    """Returns how `script_path` is started: with the variant's file, or in the manner of this repository's other
    scripts.

    `meta_data: arguments` says it: "file" (`-e FILE -g GPU`), "hydra" (`key=value`, with config_dir and config_name;
    the default for script/run.py), "flags" (`--key value`, the default for scripts/).
    """
    script, style = str(variant["script_path"]), style_of(variant)
    if not Path(script).is_file():
        raise UserError(f"script_path {script}: no such file (paths are relative to the folder you start in)")
    start = [sys.executable, script]
    if style == "file":
        return [*start, "-e", str(path), "-g", gpu]
    if style == "flags":
        return [*start, *as_flags(variant)]
    if style == "hydra":
        named = {key: variant[key] for key in HYDRA_OPTIONS if key in variant}
        return [*start, *(f"--{key.replace('_', '-')}={value}" for key, value in named.items()), *as_overrides(variant)]
    raise UserError(f"meta_data: arguments {style!r} is unknown: choose file, hydra or flags")


def style_of(variant: Mapping[str, Any]) -> str:
    """Returns how the script of a variant takes its values: "file", "hydra" or "flags"."""
    script = Path(str(variant["script_path"]))
    usual = {("script", "run.py"): "hydra"}.get((script.parent.name, script.name))
    return variant.get("arguments") or usual or ("flags" if script.parent.name == "scripts" else "file")


def tell_apart(runs: list[dict[str, Any]], varied: Sequence[str]) -> list[dict[str, Any]]:
    """Returns variants of which no two write to one folder, where that can be known: of this repository's own scripts.

    Where some would, what varies is appended to the name of each run.

    Raises:
        UserError: they still would, since their values are equal.
    """
    if len(runs) == 1:
        return runs
    folders = [folder_of(variant, style_of(variant)) for variant in runs]
    if _twice(folders) is not None:
        for variant in runs:
            parts = [f"{key}_{_at(variant, key)}" for key in varied if key != "seed"]
            append_to_name(variant, style_of(variant), "".join(f"-{_plain(part)}" for part in parts))
        folders = [folder_of(variant, style_of(variant)) for variant in runs]
    if (folder := _twice(folders)) is not None:
        same = ", ".join(str(i) for i, other in enumerate(folders) if other == folder)
        raise UserError(
            f"runs {same} would all write to {folder}: they do not differ in {', '.join(varied) or 'anything'}"
        )
    return runs


def _twice(folders: Sequence[str | None]) -> str | None:
    known = [folder for folder in folders if folder is not None]
    return next((folder for folder, count in collections.Counter(known).items() if count > 1), None)


def _at(variant: Mapping[str, Any], key: str) -> Any:
    return functools.reduce(lambda node, part: node[part], key.split("."), variant)


def _plain(text: str) -> str:
    """Returns what can stand in every name of a folder."""
    return re.sub(r"[^\w.+-]+", "-", text)[:80].replace("..", "-")


# ---------- all of them ----------


class Pool:
    """Runs jobs, at most `workers` at a time; `status.json` in their folder says what is done.

    Args:
        stream: where lines about the progress go.
        place: where jobs run, one of `cluster.launch.PLACES`.
        again: the flag that goes on with what was interrupted.
    """

    def __init__(
        self,
        folder: Path,
        jobs: Sequence[Job],
        workers: int,
        gpu: str,
        stream: TextIO | None = None,
        place: str = "here",
        again: str = "--resume",
    ):
        self.place, self.again = place, again
        self.folder, self.jobs, self.workers = folder, list(jobs), max(1, min(workers, len(jobs)))
        self.stream = sys.stderr if stream is None else stream
        self.environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        self.began = self.reported = time.monotonic()
        self.awaited: list[Job] = []
        self.skipped = sum(job.status == 0 for job in self.jobs)  # done in an earlier launch

    def run(self, poll_seconds: float = 1.0) -> int:
        """Runs all; returns 0, or 1 if any failed. Ctrl-C and SIGTERM stop the children, which save their state."""
        waiting = [job for job in self.jobs if job.status != 0]
        running: list[Job] = []
        try:
            with signals.interrupting():
                while waiting or running:
                    self._start(waiting, running)
                    time.sleep(poll_seconds)
                    for job in [job for job in running if job.poll()]:
                        running.remove(job)
                        self._save()
                        self._ended(job)
                    self._report(running)
        except KeyboardInterrupt:
            self._stop(running)
            raise Interrupted(f"interrupted; {self.again} goes on with what is not done in {self.folder}") from None
        return self._summary()

    def _start(self, waiting: list[Job], running: list[Job]) -> None:
        """Starts as many as there are workers for; those of an earlier launch are waited for."""
        for job in waiting[: self.workers - len(running)]:
            if job.start(self.environment, self.place):
                waiting.remove(job)
                running.append(job)
            elif job not in self.awaited:
                self.awaited.append(job)
                self._say(f"run {job.variant.stem}: its process of an earlier launch still runs; waiting for its end")

    def _stop(self, running: Sequence[Job]) -> None:
        """Asks all processes to stop, and kills those that have not after a while or at another signal."""
        processes = [job.process for job in running if job.process is not None]
        with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            for process in processes:
                process.terminate()
            until = time.monotonic() + STOP_SECONDS
            for process in processes:
                process.wait(max(until - time.monotonic(), 0.1))
        for process in processes:
            process.kill()  # nothing where it has ended
            process.wait()
        for job in running:
            job.poll()
        self._save()

    def _save(self) -> None:
        facts = {job.variant.stem: {"exit": job.status, "seconds": round(job.seconds, 1)} for job in self.jobs}
        write_json(self.folder / "status.json", facts)

    def _ended(self, job: Job) -> None:
        what = "done" if job.status == 0 else f"FAILED (exit status {job.status}): {job.last_line()}; see {job.log}"
        self._say(f"run {job.variant.stem}: {what}, {duration(job.seconds)}")

    def _report(self, running: Sequence[Job]) -> None:
        live = self.stream.isatty()
        if not running or time.monotonic() - self.reported < (1 if live else LINE_SECONDS):
            return
        self.reported = time.monotonic()
        text = self.progress(running)
        if live:
            print(f"\r\033[K{text[: os.get_terminal_size(self.stream.fileno()).columns - 1]}", end="", file=self.stream)
            self.stream.flush()
        else:
            self._say(text)

    def progress(self, running: Sequence[Job]) -> str:
        """Returns one line: how many are done, how long it will take, what the running ones say."""
        ended, elapsed = sum(job.status is not None for job in self.jobs), time.monotonic() - self.began
        here = len(self.jobs) - self.skipped
        share = (ended - self.skipped + sum(job.share() for job in running)) / max(here, 1)
        left = f", about {duration(elapsed * (1 - share) / share)} left" if share > 0 else ""
        lines = "; ".join(f"{job.variant.stem}: {job.last_line()[:60]}" for job in running)
        return f"{ended}/{len(self.jobs)} done, {duration(elapsed)} elapsed{left} | {lines}"

    def _say(self, text: str) -> None:
        print(("\r\033[K" if self.stream.isatty() else "") + text, file=self.stream, flush=True)

    def _summary(self) -> int:
        failed = [job for job in self.jobs if job.status != 0]
        self._save()
        self._say(f"{len(self.jobs) - len(failed)} of {len(self.jobs)} runs done; {self.folder}")
        for job in failed:
            self._say(f"  failed: run {job.variant.stem}, exit status {job.status}, {job.log}")
        return 1 if failed else 0


def main(arguments: Sequence[str]) -> int:
    """Runs an experiment, `run_experiment.py -e SPEC [-g GPU] [--resume] [--dry-run]`; the exit status says whether all
    runs succeeded."""
    parser = experiment_arguments("Run every combination of an experiment's variables.", HELP)
    parser.add_argument("--resume", action="store_true", help="go on with the last launch: skip the runs that are done")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and start nothing")
    where = "on this machine, on a Ray cluster, as jobs of Slurm, or as those without Slurm"
    parser.add_argument("--on", choices=PLACES, default="here", help=f"where runs go: {where}")
    parsed = parser.parse_args(list(arguments))
    gpu, spec = gpu_number(parsed.gpu), read_spec(Path(parsed.experiment))
    runs = tell_apart(variants(spec), [key for key, _ in flat(spec.get("variables") or {})])
    root = Path(output_folder("logs")) / "variants" / f"variants-for-{spec['meta_data']['exp_name']}"
    for variant in runs:  # what cannot be started is said before anything is written
        command = command_of(variant, root / f"{variant['exp_id']}.yaml", gpu)
        if parsed.dry_run:
            print(" ".join(command))
    if parsed.dry_run:
        return 0
    folder = _last_launch(root, spec) if parsed.resume else None
    if folder is None:
        folder = _new_folder(root)
        write_yaml(folder / "exp_spec_definition.yaml", spec)
        for variant in runs:
            write_yaml(folder / f"{variant['exp_id']}.yaml", variant)
    with locked(folder, "start it anew without --resume"):
        workers = int(spec["meta_data"].get("num_workers") or 1)
        return Pool(folder, _jobs(folder, runs, gpu), workers, gpu, place=parsed.on).run()


def _jobs(folder: Path, runs: Sequence[Mapping[str, Any]], gpu: str) -> list[Job]:
    """Returns the runs of a launch; done are those that ended well as the very variants that they are now."""
    done, jobs = _statuses(folder), []
    for variant in runs:
        path = folder / f"{variant['exp_id']}.yaml"
        if not path.is_file() or read_spec(path) != variant:
            write_yaml(path, variant)
            done.pop(path.stem, None)
        jobs.append(Job(path, command_of(variant, path, gpu), done.get(path.stem)))
    return jobs


def _new_folder(root: Path) -> Path:
    """Makes a folder named after the time; two launches in the same second get different ones."""
    stamp = time.strftime("variants-%Y_%m_%d_%H_%M_%S")
    for suffix in itertools.count():
        folder = root / (stamp if suffix == 0 else f"{stamp}-{suffix}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def _last_launch(root: Path, spec: Mapping[str, Any]) -> Path | None:
    """Returns the newest folder of this very specification."""
    folders = sorted((p for p in root.glob("variants-*") if p.is_dir()), reverse=True)
    same = (p for p in folders if (p / "exp_spec_definition.yaml").is_file())
    return next((p for p in same if read_spec(p / "exp_spec_definition.yaml") == spec), None)


def _statuses(folder: Path) -> dict[str, int]:
    try:
        facts = read_json(folder / "status.json")
        return {name: 0 for name, fact in facts.items() if fact["exit"] == 0}
    except (UserError, KeyError, TypeError, AttributeError):
        return {}
