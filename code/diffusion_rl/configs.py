"""The configuration files: where they are, and composing them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from diffusion_rl.core.config import register_resolvers

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_ROOT = next((d for d in (REPOSITORY / "cfg", Path.cwd() / "cfg") if (d / "_base").is_dir()), REPOSITORY / "cfg")


def shipped_configs() -> list[str]:
    """Names of all configurations of `script/run.py`, such as "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"."""
    files = (path.relative_to(CONFIG_ROOT) for path in CONFIG_ROOT.rglob("*.yaml"))
    return sorted(str(path.with_suffix("")) for path in files if path.parts[0] not in ("_base", "planning"))


def compose(name: str, overrides: Sequence[str] = (), *, folder: str | Path | None = None) -> DictConfig:
    """The configuration `name`, resolved lazily, in `folder` or below cfg/, with its `hydra` node."""
    register_resolvers()
    GlobalHydra.instance().clear()
    overrides = list(overrides)
    if folder is not None and Path(folder).resolve() != CONFIG_ROOT:
        overrides.append(f"hydra.searchpath=['file://{CONFIG_ROOT}']")
    with hydra.initialize_config_dir(str(Path(folder or CONFIG_ROOT).resolve()), version_base="1.3"):
        return hydra.compose(name.removesuffix(".yaml"), overrides, return_hydra_config=True)
