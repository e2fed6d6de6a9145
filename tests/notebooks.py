"""Run notebooks and keep in them what they show: python -m tests.notebooks [FILE ...] (default: the tutorials)

Each runs from top to bottom in a kernel of this interpreter, with an empty folder for what it writes. Names of folders
of this machine are left out of what is kept, and bars of progress.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.pages import TUTORIALS, joined

from diffusion_rl.config.compose import REPOSITORY

TIMEOUT = 1800  # seconds of a cell
BAR = r"[^\n|]*\d+%\|[^\n|]*\| [\d:]+(, about [^\n]*? left)?\n?"  # of progress


def execute(path: Path, folder: Path, add: Callable[[str], str] = lambda command: "") -> Any:
    """Run a notebook, its commands with what is to be added to them; returns it with what it shows.

    Raises what a cell raises, and an AssertionError for a command that fails.
    """
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("!"):
            cell.source = checked(cell.source, add)
    own = {"TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY / "code")}
    own["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    places = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=TIMEOUT, resources=places, record_timing=False)
    client.execute(env=os.environ | own)
    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source
    return notebook


def checked(source: str, add: Callable[[str], str]) -> str:
    """A cell of commands that fails where one of them does."""
    lines = []
    for line in joined(source).splitlines():
        command, other, rest = line[1:].partition(" || ")
        lines += [f"!{command} {add(command)}{other}{rest}", f"assert _exit_code == 0, {command!r}"]
    return "\n".join(lines)


def keep(path: Path) -> float:
    """Run a notebook and write it with what it shows. Returns the seconds."""
    import nbformat

    before, began = nbformat.read(path, as_version=4), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        after = execute(path, folder)
        after.metadata = before.metadata
        for cell in after.cells:
            if cell.cell_type == "code":
                cell.outputs = joined_streams(cell.outputs)
                for output in cell.outputs:
                    clean(output, folder)
    nbformat.write(after, path)
    return time.monotonic() - began


def joined_streams(outputs: list[Any]) -> list[Any]:
    """Outputs, the pieces of one text together."""
    kept: list[Any] = []
    for output in outputs:
        if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def clean(output: Any, folder: Path) -> None:
    """Take out of an output what a terminal would not show, and folders of this machine."""
    for holder, key in ((output, "text"), (output.get("data", {}), "text/plain")):
        if isinstance(holder.get(key), str):
            shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", holder[key]).replace("\r\n", "\n")
            shown = re.sub(r"[^\n]*\r", "", shown)  # what was written over
            shown = re.sub(BAR, "", shown)
            shown = re.sub(rf"{re.escape(str(folder))}/\w+/", "", shown)
            for place in (REPOSITORY, REPOSITORY.resolve(), Path(sys.prefix).parent, Path(sys.prefix).resolve().parent):
                shown = shown.replace(f"{place}/", "")
            holder[key] = shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="notebooks")
    for path in parser.parse_args().files or TUTORIALS:
        print(f"{path}: {keep(path.resolve()):.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
