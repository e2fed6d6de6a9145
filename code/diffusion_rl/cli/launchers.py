"""Trainings and plans elsewhere: in a container, on a Slurm cluster, on Azure. `--dry_run True` prints what would run.

The image is built from the Dockerfile (or Singularity.def) of this repository; the repository is bound to /home/code in
it and D4RL's data to /root/.d4rl.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from diffusion_rl.cli.status import show
from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.config.overrides import flags, help_rows, meanings, pairs, split_help
from diffusion_rl.config.schema import FLAG, FLAGS, TEXT, Option, one_of, whole
from diffusion_rl.core.errors import UserError
from diffusion_rl.reports.plan_results import DATASETS

Command = list[str]
CODE = "/home/code"  # in containers
TRIALS, TOGETHER = 50, 2  # of a job of plans: how many, and how many at a time
AZURE_CORES, AZURE_GIGABYTES = 4, 16
MOST_INSTANCES = 1000
AZURE_NEEDS = {
    "DOCKER_USERNAME": "to the account that the image was pushed to (docker push)",
    "AZURE_STORAGE_ACCOUNT": "to a storage account (see azure/config.py): the logs of an instance go with it",
    "AZURE_CLIENT_ID": "with AZURE_TENANT_ID and AZURE_CLIENT_SECRET to a service principal that may write there",
}
AZURE_STORAGE = ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_CONTAINER", "AZURE_TENANT_ID", "AZURE_CLIENT_ID")
AZURE_SECRET = "AZURE_CLIENT_SECRET"
SCRIPTS = {"train": "scripts/train.py", "values": "scripts/train_values.py", "plan": "scripts/plan_guided.py"}
OPTIONS = {
    "job": Option("what is started", one_of(*SCRIPTS), default="train"),
    "dry_run": Option("print the commands and start nothing", FLAG, default=False),
    "image": Option("the Docker image", TEXT, default="diffuser"),
    "sif": Option("the Singularity image", TEXT, default="diffuser.sif"),
    "trials": Option("slurm: plans of a data set", whole(1, 100_000), default=150),
}


def main(arguments: Sequence[str]) -> None:
    """Runs jobs elsewhere: `docker|singularity|slurm|azure [--job train|values|plan] [--dry_run True] [--<option of the
    job> VALUE …]`."""
    if split_help(arguments)[0]:
        usage = f"usage: python scripts/launch.py {'|'.join(PLACES)} [--option value ...]"
        rows = help_rows(flags({}, OPTIONS, "the launcher"), meanings(OPTIONS), FLAGS)
        return show(f"{usage}\n\n{rows}\nAny other option is the job's: --help of its script lists them.")
    if not arguments or arguments[0] not in PLACES:
        raise UserError(f"say where: one of {', '.join(PLACES)}")
    texts = pairs(arguments[1:])
    own = {key: texts.pop(key) for key in OPTIONS if key in texts}
    settings = flags(own, OPTIONS, "the launcher")
    run_all(PLACES[arguments[0]](settings, texts), settings["dry_run"])


def run_all(commands: Iterator[Command], dry_run: bool) -> None:
    """Prints each command, and runs it unless this is a dry run; the first that fails ends it."""
    for command in commands:
        shown = (re.sub(f"^{AZURE_SECRET}=.+", f"{AZURE_SECRET}=***", word) for word in command)
        print(shlex.join(shown), flush=True)
        if dry_run:
            continue
        if shutil.which(command[0]) is None:
            raise UserError(f"{command[0]} is not installed (--dry_run True only prints the commands)")
        if status := subprocess.run(command).returncode:
            raise UserError(f"{command[0]} ended with status {status}")


def job(settings: Mapping, options: Mapping[str, str]) -> Command:
    """Returns the command of one job, from the repository's root."""
    return ["python", SCRIPTS[settings["job"]], *itertools.chain(*((f"--{k}", v) for k, v in options.items()))]


def docker(settings: Mapping, options: Mapping[str, str]) -> Iterator[Command]:
    """Yields one job in the image."""
    mounts = {str(REPOSITORY): CODE, str(Path.home() / ".d4rl"): "/root/.d4rl"}
    bound = [f"--mount=type=bind,source={source},target={target}" for source, target in mounts.items()]
    inside = f"cd {CODE} && {shlex.join(job(settings, options))}"
    yield ["docker", "run", "--rm", "--gpus", "all", *bound, settings["image"], "bash", "-c", inside]


def singularity(settings: Mapping, options: Mapping[str, str]) -> Iterator[Command]:
    """Yields one job in the Singularity image."""
    yield ["singularity", "exec", "--nv", "--writable-tmpfs", settings["sif"], *job(settings, options)]


def slurm(settings: Mapping, options: Mapping[str, str]) -> Iterator[Command]:
    """Yields a job for each locomotion data set; plans in jobs of 50 trials, two at a time."""
    datasets = [options["dataset"]] if "dataset" in options else DATASETS
    for dataset in datasets:
        task, _, buffer = dataset.removesuffix("-v2").partition("-")
        changed, name = {**options, "dataset": dataset}, f"{settings['job']}-{task[:2]}-{buffer}"
        if settings["job"] != "plan":
            yield _sbatch(name, settings, shlex.join(job(settings, changed)))
            continue
        for first in range(0, settings["trials"], TRIALS):
            last = min(first + TRIALS, settings["trials"]) - 1
            trial = shlex.join(job(settings, {"vis_freq": "500", "verbose": "False", **changed}))
            trials = f"seq {first} {last} | xargs -P {TOGETHER} -I TRIAL {trial} --suffix TRIAL"
            yield _sbatch(f"{name}-{first}-{last}", settings, trials)


def _sbatch(name: str, settings: Mapping, command: str) -> Command:
    wrapped = shlex.join(["singularity", "exec", "--nv", "--writable-tmpfs", settings["sif"], "bash", "-c", command])
    needed = ["--nodes=1", "--ntasks=1", "--cpus-per-task=4", "--mem=24G", "--gres=gpu:1", "--time=72:00:00"]
    return ["sbatch", f"--job-name={name}", *needed, f"--wrap={wrapped}"]


def azure(settings: Mapping, options: Mapping[str, str]) -> Iterator[Command]:
    """Yields a container instance for each combination of comma-separated values, by a client that is logged in (`az
    login`).

    DOCKER_USERNAME says whose image it is; AZURE_RESOURCE_GROUP (diffuser), AZURE_REGION and AZURE_SUBSCRIPTION_ID say
    where the instances are. A job sends its logs to AZURE_STORAGE_CONTAINER of AZURE_STORAGE_ACCOUNT (azure/sync.sh).
    """
    given = os.environ.get
    for name, cure in AZURE_NEEDS.items():
        if not given(name) and not settings["dry_run"]:
            raise UserError(f"set {name} {cure}")
    image = f"docker.io/{given('DOCKER_USERNAME') or '$DOCKER_USERNAME'}/{settings['image']}:latest"
    where = ["--resource-group", given("AZURE_RESOURCE_GROUP") or "diffuser", "--image", image]
    for option, value in (("--location", given("AZURE_REGION")), ("--subscription", given("AZURE_SUBSCRIPTION_ID"))):
        where += [option, value] if value else []
    size = ["--cpu", str(AZURE_CORES), "--memory", str(AZURE_GIGABYTES), "--restart-policy", "Never"]
    storage = ["--environment-variables", *(f"{name}={given(name, '')}" for name in AZURE_STORAGE)]
    storage += ["--secure-environment-variables", f"{AZURE_SECRET}={given(AZURE_SECRET, '')}"]
    split = [value.split(",") for value in options.values()]
    if (count := math.prod(map(len, split))) > MOST_INSTANCES:
        raise UserError(
            f"these are {count} combinations, of which {MOST_INSTANCES} are started at most: give fewer values"
        )
    for number, values in enumerate(itertools.product(*split)):
        command = shlex.join(job(settings, dict(zip(options, values, strict=True))))
        inside = f"{command}; status=$?; ./azure/download.sh && ./azure/sync.sh up && exit $status"
        own = ["--name", f"diffuser-{settings['job']}-{number}", "--command-line", shlex.join(["bash", "-c", inside])]
        yield ["az", "container", "create", *where, *size, *storage, *own]


PLACES = {"docker": docker, "singularity": singularity, "slurm": slurm, "azure": azure}
