"""Run the commands of the five documents that this package follows, as they are spelled there, a line each:

    python -m tests.document_commands [--only DOCUMENT] [--match TEXT] [--folder FOLDER]

`data/document_commands.yaml` lists them in the order of the documents, each with what shortens it. They run in a folder
with links to what a checkout has, so that what they write (log/, logs/, results/) lies there; later commands find what
earlier ones have left. A command that needs what few machines have is listed and not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffusion_rl.config.compose import REPOSITORY

LIST = Path(__file__).parent / "data" / "document_commands.yaml"
LIMIT = 900  # seconds
CANNOT = "cannot be had here"


@dataclass(frozen=True)
class Command:
    """A command line of a document.

    line: as the document spells it, where that is no command yet (`{?img}` and the like). shorten: what is added to
    make it short. environment: variables. status, says: what it ends with, and what its last line holds. needs: what it
    needs that few machines have.
    """

    document: str
    command: str
    line: str = ""
    shorten: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    status: int = 0
    says: str = ""
    needs: str = ""

    def run(self, folder: Path) -> tuple[float, str]:
        """Seconds, and "ok" or what it ended with."""
        if self.needs:
            return 0.0, f"{CANNOT}: {self.needs}"
        began = time.monotonic()
        try:
            done = subprocess.run(
                ["bash", "-c", f"{self.command} {self.shorten}"],
                **{"cwd": folder, "env": self.variables(), "timeout": LIMIT},
                **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
            )
            status, text = str(done.returncode), done.stdout
        except subprocess.TimeoutExpired:
            status, text = f"no end after {LIMIT} s", ""
        last = (text.strip().splitlines() or [""])[-1]
        right = status == str(self.status) and self.says in last
        return time.monotonic() - began, "ok" if right else f"{status}: {last[:200]}"

    def variables(self) -> dict[str, str]:
        """The environment: this interpreter is `python` and `pip`; runs lie in the folder."""
        paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "DPPO_LOG_DIR", "DPPO_DATA_DIR")}
        return {**kept, "PATH": paths, **self.environment}


def read(path: Path = LIST) -> list[Command]:
    """The list. A command's `shorten` names groups of the file's `shorten`, which are joined."""
    listed: dict[str, Any] = yaml.safe_load(path.read_text())
    return [
        Command(**{**given, "shorten": " ".join(listed["shorten"][name] for name in given.get("shorten", "").split())})
        for given in listed["commands"]
    ]


def prepare(folder: Path) -> None:
    """Fill the folder with links to what a checkout has, and a copy of exp_specs/, which a command writes to."""
    folder.mkdir(parents=True, exist_ok=True)
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in sorted({line.partition("/")[0] for line in tracked.splitlines()}):
        if name == "exp_specs":
            shutil.copytree(REPOSITORY / name, folder / name, dirs_exist_ok=True)
        elif not (folder / name).exists():
            (folder / name).symlink_to(REPOSITORY / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a document's name or its beginning")
    parser.add_argument("--match", default="", help="a part of the command")
    parser.add_argument("--folder", type=Path, help="where they run; default: a temporary folder")
    given = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        prepare(folder)
        for command in read():
            if command.document.startswith(given.only) and given.match in command.command:
                seconds, result = command.run(folder)
                wrong += not (result == "ok" or command.needs)
                print(f"{command.document:5} {seconds:5.0f} s  {command.command}\n{'':15}{result}", flush=True)
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
