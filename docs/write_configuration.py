"""Write docs/configuration.md, every key of every program, from the tables that check them.

    python docs/write_configuration.py

A test compares the page with the tables (tests/test_pages.py).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from diffusion_rl.config import keys
from diffusion_rl.config.overrides import comments, meanings
from diffusion_rl.config.schema import ABSENT, ANY, PAIRS, TEXT, TEXT_OR_NONE, Kind
from diffusion_rl.methods.diffuser import options as diffuser
from diffusion_rl.methods.diffuser_lite import options as lite
from diffusion_rl.methods.vae_latent import options as vae

PAGE = Path(__file__).parent / "configuration.md"
INTRODUCTION = """# Configuration keys

`python docs/write_configuration.py` writes this page from the tables that the programs check their options with.
`--help` of each program lists the same keys with the values that they have in a configuration.
[Configuration files](../cfg/README.md) says how they are made of parts.

## `script/run.py`

Keys marked [ours] are not in the PyTorch code. A default is shown where a configuration may leave the key out. Keys of
`model` and of other nodes with a `_target_` are the arguments of that class.
"""
PARTS = {"": "The run and its task", "env": "Environments (`env`)", "train": "Training (`train`)"}
LITE = [lite.FOLDER / f"{name}.yaml" for name in ("mujoco", "kitchen", "antmaze")]
TASK = lite.FOLDER / "task" / "hopper-medium-v2.yaml"


def table(rows: Iterable[tuple[str, ...]], *names: str) -> list[str]:
    """Returns the lines of a table of Markdown."""
    cells = [[cell.replace("|", "\\|").replace("<", "\\<") for cell in row] for row in (names, *rows)]
    return ["", *(f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(names), *cells[1:])), ""]


def allowed(kind: Kind | None) -> str:
    """Returns what an option may be, in words; bounds that nobody meets are left out."""
    if kind is None or kind in (ANY, TEXT, TEXT_OR_NONE):
        return ""
    kind = replace(kind, most=kind.most if kind.most < 1e9 else math.inf)
    return ", ".join(kind.words) + kind.hint if kind.words else str(kind).removeprefix("a ")


def of_run() -> list[str]:
    """Returns the tables of script/run.py, a part of the keys after the other."""

    def part(key: str) -> str:
        first = key.partition(".")[0] if "." in key else ""
        return first if first in PARTS else ""

    lines = []
    named = sorted(keys.OPTIONS, key=lambda key: (list(PARTS).index(part(key)), key))
    for name, group in groupby(named, part):
        options = [(key, keys.OPTIONS[key]) for key in group]
        rows = [
            (f"`{key}`", o.meaning, allowed(o.kind), "" if o.default is ABSENT else f"`{PAIRS.text(o.default)}`")
            for key, o in options
        ]
        lines += [f"### {PARTS[name]}", *table(rows, "key", "meaning", "may be", "default")]
    return lines


def of_planner(meaning: Mapping[str, str], kinds: Mapping[str, Kind]) -> list[str]:
    """Returns the table of a program whose meanings stand beside the keys of its YAML files."""
    rows = [(f"`{key}`", text, allowed(kinds.get(key))) for key, text in meaning.items()]
    return table(rows, "key", "meaning", "may be")


def page() -> str:
    """Returns the whole page."""
    task = {f"task.{key}": text for key, text in comments(TASK).items()}
    lines = [
        INTRODUCTION,
        *of_run(),
        "## Diffuser (`scripts/`)",
        *of_planner(comments(*diffuser.SHIPPED), diffuser.KINDS),
        "## DiffuserLite (`pipelines/`)",
        *of_planner(comments(*LITE) | task, lite.KINDS),
        "## VAE + Diffusion RL (`train.py`)",
        *of_planner(comments(vae.DEFAULTS), vae.KINDS),
        "## VAE + Diffusion RL, evaluation (`script/evaluate_experiment.py`)",
        *of_planner(meanings(vae.EVALUATION), {key: option.kind for key, option in vae.EVALUATION.items()}),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
