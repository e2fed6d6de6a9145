"""Rung 0: every resolved value of our configurations against the reference's.

`goldens/config_values.json` holds the reference's values of the configurations that we ship, flat, resolved with
DPPO_DATA_DIR=data, DPPO_LOG_DIR=log, DPPO_WANDB_ENTITY=entity and the date 2000-01-01 00-00-00.
`python -m parity_tests.r0_config` writes the table of deliberate differences to figure/parity/.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from diffusion_rl.config.compose import REPOSITORY, compose, shipped_configs
from diffusion_rl.config.instantiate import flatten
from diffusion_rl.config.targets import REFERENCE_TARGETS

HERE = Path(__file__).resolve().parent
VALUES = HERE / "goldens" / "config_values.json"
DIFFERENCES = HERE / "r0_differences.yaml"
TABLE = REPOSITORY / "figure" / "parity" / "config_differences.md"
ABSENT = "(absent)"
ENVIRONMENT = {"DPPO_DATA_DIR": "data", "DPPO_LOG_DIR": "log", "DPPO_WANDB_ENTITY": "entity"}


@dataclass
class Difference:
    """One line of the table: what may differ where, and why. `found` collects (configuration, key) where it does."""

    keys: list[str]
    ours: Any
    reference: Any
    why: str
    configs: list[str] = field(default_factory=lambda: ["*"])
    found: list[tuple[str, str]] = field(default_factory=list)

    def covers(self, config: str, key: str, ours: Any, reference: Any) -> bool:
        """Whether this line allows `key` of `config` to be `ours` where the reference has `reference`."""
        return (
            any(fnmatchcase(config, pattern) for pattern in self.configs)
            and any(fnmatchcase(key, pattern) for pattern in self.keys)
            and _matches(ours, self.ours)
            and _matches(reference, self.reference)
        )

    def stale(self) -> list[str]:
        """What of this line no longer occurs: patterns of keys or of configurations without a difference."""
        keys = [p for p in self.keys if not any(fnmatchcase(key, p) for _, key in self.found)]
        return keys + [p for p in self.configs if not any(fnmatchcase(config, p) for config, _ in self.found)]


# of ReinFlow, DSRL and flow Q-learning, whose configurations are not recorded
ELSEWHERE = re.compile(r"_(reflow|shortcut)_mlp(_img|_regularize)?$|_dsrl_|/(qc_)?fql_mlp_|/qc_mlp_")


def compared_configs() -> list[str]:
    """The shipped configurations that the reference has."""
    return [name for name in shipped_configs() if not ELSEWHERE.search(name)]


def _matches(value: Any, pattern: Any) -> bool:
    if value == ABSENT or not isinstance(pattern, str):
        return value == pattern and type(value) is type(pattern)
    return fnmatchcase(str(value), pattern)


def reference_values(path: Path = VALUES) -> dict[str, dict[str, Any]]:
    """{configuration: {flat key: value}} of the reference."""
    return json.loads(path.read_text())


def our_values(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The flat resolved values of one of our configurations under the conditions of the reference's."""
    return resolved_values(composed(config, overrides))


def composed(config: str, overrides: Sequence[str] = ()) -> tuple[DictConfig, str]:
    """One of our configurations, unresolved, and the folder of its runs."""
    with conditions():
        cfg = compose(config, overrides)
        run_dir = cfg.hydra.run.dir
    del cfg.hydra
    return cfg, run_dir


def resolved_values(config: tuple[DictConfig, str]) -> dict[str, Any]:
    """The flat values of what `composed` returns."""
    cfg, run_dir = config
    with conditions():
        values = flatten(OmegaConf.to_container(cfg, resolve=True))
    return {key: undated(value) for key, value in {"hydra.run.dir": run_dir, **values}.items()}


@contextmanager
def conditions() -> Iterator[None]:
    """Set the environment variables as they were when the reference's values were recorded."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def undated(value: Any) -> Any:
    """Dates as the recorded values have them."""
    if not isinstance(value, str):
        return value
    value = re.sub(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", "2000-01-01_00-00-00", value)
    return re.sub(r"^\d\d-\d\d-\d\d_", "00-00-00_", value)


def differences(path: Path = DIFFERENCES) -> list[Difference]:
    """The table of deliberate differences."""
    return [Difference(**row) for row in yaml.safe_load(path.read_text())]


def compare(
    config: str, ours: dict[str, Any], reference: dict[str, Any], allowed: Sequence[Difference]
) -> Iterator[str]:
    """A line for each value that differs from the reference's and is not allowed to; notes those that are."""
    for key in dict.fromkeys([*reference, *ours]):
        a, b = ours.get(key, ABSENT), reference.get(key, ABSENT)
        if key.endswith("_target_"):
            b = REFERENCE_TARGETS.get(b, f"{b}, which has no counterpart")
        if type(a) is type(b) and a == b:
            continue
        covering = [row for row in allowed if row.covers(config, key, a, b)]
        for row in covering:
            row.found.append((config, key))
        if not covering:
            yield f"{config}: {key} is {a!r}, in the reference {b!r}"


def table(rows: Sequence[Difference]) -> str:
    """The differences in Markdown. `rows` have been through `compare`."""
    lines = ["| key | configurations | ours | reference | why |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [_code(row.keys), _code(row.configs), _code([row.ours]), _code([row.reference]), row.why]
        lines.append("| " + " | ".join(cells) + " |")
    count = f"{len(compared_configs())} configurations, {sum(len(r) for r in reference_values().values())} values"
    head = [
        "# Configurations: deliberate differences from the reference",
        "",
        f"{count}; all others are equal. `*` is any text. Written by `python -m parity_tests.r0_config`,",
        "checked by `pytest parity_tests/test_r0_config.py`. Class names differ throughout:",
        "",
        "| reference | here |",
        "|---|---|",
        *(f"| `{theirs}` | `{ours}` |" for theirs, ours in sorted(_used_targets().items())),
        "",
    ]
    return "\n".join([*head, *lines, ""])


def _used_targets() -> dict[str, str]:
    values = (flat[key] for flat in reference_values().values() for key in flat if key.endswith("_target_"))
    return {name: REFERENCE_TARGETS[name] for name in values if name in REFERENCE_TARGETS}


def _code(values: Sequence[Any]) -> str:
    return "<br>".join(f"`{'null' if value is None else value}`" for value in values)


def main() -> int:
    """Compare everything, write the table; exit status 1 if something differs that is not listed."""
    rows, golden = differences(), reference_values()
    wrong = [
        line for config in compared_configs() for line in compare(config, our_values(config), golden[config], rows)
    ]
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(table(rows))
    print("\n".join([*wrong, f"wrote {TABLE.relative_to(REPOSITORY)}"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
