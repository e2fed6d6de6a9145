"""How pre-trained policies explore the avoiding task in the first iteration of fine-tuning (DPPO, Figure 7)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_rl.cli import app
from diffusion_rl.cli.figures import OUTPUT, with_table
from diffusion_rl.config.compose import Config, compose_job
from diffusion_rl.core import quiet
from diffusion_rl.core.places import output_folder
from diffusion_rl.data.episodes import load_episodes
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.data.sources.d3il import MODE_SETS
from diffusion_rl.reports.exploration import Panel, draw

POLICIES = ("diffusion", "gaussian", "gmm")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the command `exploration` of script/make_figures.py."""
    command = commands.add_parser("exploration", help="avoiding: paths of pre-trained policies at the first iteration")
    command.add_argument("--mode", action="append", choices=sorted(MODE_SETS), help="a row each; default: all")
    command.add_argument("--policy", action="append", choices=POLICIES, help="a column each; default: all")
    command.add_argument("--paths", type=int, default=50, help="environments, one path each")
    command.add_argument("--output", default=output_folder("figure/d3il/exploration.png"), help=OUTPUT)
    command.add_argument("override", nargs="*", help="of the fine-tuning configurations, seed=1 for instance")
    command.set_defaults(draw=_draw)


def _draw(
    mode: list[str] | None, policy: list[str] | None, paths: int, output: str, override: list[str], command: str
) -> str:
    panels: list[Panel] = []
    for modes in mode or sorted(MODE_SETS):
        for name in policy or POLICIES:
            config_name = f"d3il/finetune/avoid_{modes}/ft_ppo_{name}_mlp"
            config = app.prepare(compose_job(config_name, [f"env.n_envs={paths}", *override]))
            if not panels or panels[-1].modes != modes:
                panels.append(demonstrations(modes, config))
            panels.append(Panel(modes, name, *sample(config)))
    path, numbers = draw(panels, output, command)
    return f"{numbers}\n{with_table(path)}"


def demonstrations(modes: str, config: Config) -> Panel:
    """Returns the data that the policies of this configuration were pre-trained on."""
    bounds = MinMaxNormalizer.from_npz(config.normalization_path)
    episodes = load_episodes(f"{config.data_dir}/{config.suite}/avoid_{modes}/train.npz")
    ends = np.cumsum(episodes.traj_lengths)[:-1]
    paths = np.split(positions(episodes.states, bounds), ends)
    return Panel(modes, "data", paths, np.zeros(len(paths), bool))


def positions(states: np.ndarray, bounds: MinMaxNormalizer) -> np.ndarray:
    """Returns positions [..., 2] in metres of normalised observations [..., 4]."""
    low, high = bounds.obs_min[2:], bounds.obs_max[2:]
    return (states[..., 2:] + 1) / 2 * (high - low + 1e-6) + low


def sample(config: Config) -> tuple[Sequence[np.ndarray], np.ndarray]:
    """Returns paths [T, 2] of the first iteration of a fine-tuning run, as it explores, and which touched an
    obstacle."""
    quiet.import_tensorflow()  # which other figures do not need
    from diffusion_rl.methods.on_policy.training import OnPolicyTraining
    from diffusion_rl.training.evaluation import deciding
    from diffusion_rl.training.rollout import collect

    loop = OnPolicyTraining(config)
    venv: Any = loop.venv  # that of the task avoiding
    frames: list[np.ndarray] = []
    collect(
        venv,
        deciding(loop.trainer.actor, loop.rng, deterministic=False),
        loop.n_steps,
        venv.reset(),
        np.ones(loop.n_envs),
        loop.act_steps,
        store=lambda observations, actions, result: frames.append(result.infos["full_observations"]["state"]),
    )
    paths = positions(np.concatenate(frames, axis=1), venv.normalizer)
    collided = venv.collided.copy()
    venv.close()
    return list(paths), collided
