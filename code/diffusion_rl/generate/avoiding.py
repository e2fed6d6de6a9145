"""Demonstrations of the avoiding task in our simulator: D3IL's replayed, and home-made ones.

D3IL's recordings cannot be shipped with this repository; `data/d3il/README.md` says what was made instead. The commands
are `script/dataset/replay_avoiding.py` and `script/dataset/make_avoiding_demos.py`.

Shape letters: E demonstrations, T steps.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.typing import Rng
from diffusion_rl.data.episodes import Episodes, save_scaled
from diffusion_rl.data.sources import d3il
from diffusion_rl.data.sources.d3il import Demonstration
from diffusion_rl.envs.panda import ArmStates, PandaPhysics
from diffusion_rl.tasks import avoiding


def follow(setpoints: Sequence[np.ndarray], physics: PandaPhysics | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    """Moves from the start towards each of the setpoints [T,2] for 35 ms.

    Returns the positions [T, 2] at the moment when each setpoint is given, and whether the rod ever touched an obstacle
    [E].
    """
    physics = physics or PandaPhysics()
    lengths = [len(path) for path in setpoints]
    padded = np.stack([path[np.minimum(np.arange(max(lengths)), len(path) - 1)] for path in setpoints])
    arms = ArmStates.empty(len(lengths))
    arms[np.arange(len(lengths))] = physics.start
    after = physics.move(arms, padded)
    tools = np.concatenate([arms.tool[:, None], after.tool], axis=1)
    touched = np.array([after.touching[i, :length].any() for i, length in enumerate(lengths)])
    return [tools[i, :length] for i, length in enumerate(lengths)], touched


@dataclass(frozen=True)
class Replay:
    """Describes one recording in our simulator: errors of the position in mm, the last y in m."""

    demonstration: str
    modes: str
    steps: int
    mean_error_mm: float
    max_error_mm: float
    contact: bool
    last_y: float


def replay(demonstrations: Sequence[Demonstration]) -> list[Replay]:
    """Gives the recorded setpoints to our robot, each for as long as it was held, and compares the positions."""
    positions, touched = follow([d.setpoints for d in demonstrations])
    rows = []
    for demonstration, ours, contact in zip(demonstrations, positions, touched, strict=True):
        error = 1e3 * np.linalg.norm(ours - demonstration.positions, axis=1)
        modes = "-".join(map(str, avoiding.modes_of(ours)))
        figures = round(float(error.mean()), 3), round(float(error.max()), 3)
        last = round(float(ours[-1, 1]), 4)
        rows.append(Replay(demonstration.name, modes, len(error) - 1, *figures, bool(contact), last))
    return rows


def write_table(rows: Sequence[Replay], path: Path) -> str:
    """Writes the rows as CSV; returns their summary in words."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Replay)])
    writer.writerows(astuple(row) for row in rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())
    means = [row.mean_error_mm for row in rows]
    return (
        f"{len(rows)} demonstrations, {sum(row.steps for row in rows)} steps: mean error {np.mean(means):.2f} mm "
        f"(of the worst demonstration {max(means):.2f} mm, of the worst step {max(r.max_error_mm for r in rows):.1f} "
        f"mm); {sum(row.contact for row in rows)} touch an obstacle; "
        f"{sum(row.last_y > avoiding.GOAL_Y for row in rows)} cross y = {avoiding.GOAL_Y}"
    )


GAP = {1: (0.59, -0.1), 2: (0.363, 0.08), 5: (0.285, 0.26), 6: (0.428, 0.26), 7: (0.575, 0.26), 8: (0.707, 0.26)}
GOAL_HEIGHT = 0.46
LARGEST_ACTION = 0.0125  # m a step along each axis, that of D3IL's gamepad
CLEARANCE = 0.004  # m that the rod keeps from obstacles
CANDIDATES = 24  # planned at once for one mode; the first that keep their distance are taken


def plan(mode: int, n: int, rng: Rng) -> list[np.ndarray]:
    """Draws n paths of setpoints [T,2] from the start through the gaps 1, 2 and `mode`, as people steer.

    Corners vary by about a centimetre and are cut; the speed differs from one to the next, and wavers; the beginning is
    hesitant.
    """
    start = PandaPhysics().start.tool
    through = [start, GAP[1], GAP[2]]
    if mode != 5:  # across, between the second and the third row
        across = GAP[mode][0] - GAP[2][0]
        through += [(GAP[2][0] + 0.25 * across, 0.15), (GAP[2][0] + 0.8 * across, 0.19)]
    corners = np.array([*through, GAP[mode], (GAP[mode][0], GOAL_HEIGHT)])
    paths = []
    for _ in range(n):
        jitter = 0.008 * rng.normal(corners.shape, np.float64).clip(-2, 2)
        jitter[0], jitter[-1, 1] = 0, abs(jitter[-1, 1])
        line = _rounded(corners + jitter)
        waver = np.convolve(rng.normal((200,), np.float64), np.ones(12) / 12, "same")
        speeds = LARGEST_ACTION * (rng.uniform((), 0.8, 1.05, np.float64) + 0.25 * waver)
        wait = int(rng.integers(1, 6, ()))
        paths.append(np.concatenate([np.repeat(line[:1], wait, axis=0), _paced(line, speeds)]))
    return paths


def _rounded(corners: np.ndarray, times: int = 4) -> np.ndarray:
    """Cuts the corners of a line [N,2] at a quarter and three quarters of each piece, again and again (Chaikin)."""
    for _ in range(times):
        first, second = corners[:-1], corners[1:]
        cut = np.stack([0.75 * first + 0.25 * second, 0.25 * first + 0.75 * second], axis=1).reshape(-1, 2)
        corners = np.concatenate([corners[:1], cut, corners[-1:]])
    return corners


def _paced(line: np.ndarray, speeds: np.ndarray) -> np.ndarray:
    """Returns points [T,2] along a line, speeds[t] apart, getting up to speed first."""
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    gone = np.cumsum(speeds * np.minimum(1, 0.35 + 0.13 * np.arange(len(speeds))))
    gone = np.append(gone[gone < length[-1]], length[-1])
    points = np.stack([np.interp(gone, length, line[:, axis]) for axis in (0, 1)], axis=1)
    steps = np.diff(np.concatenate([line[:1], points]), axis=0).clip(-LARGEST_ACTION, LARGEST_ACTION)
    return line[0] + np.cumsum(steps, axis=0)


def make(name: str, per_mode: int, seed: int) -> list[Demonstration]:
    """Makes demonstrations of a set of modes ("m1", …) in our simulator, `per_mode` for each of its two."""
    rng, made = NoiseSource(seed), []
    for mode in d3il.MODE_SETS[name]:
        paths = plan(mode, CANDIDATES * per_mode // 4, rng)
        positions, touched = follow(paths)
        candidates = [
            Demonstration(f"{name}_mode{mode}", path, where)
            for path, where, contact in zip(paths, positions, touched, strict=True)
            if not contact and avoiding.clearance(where).min() > CLEARANCE and where[-1, 1] > avoiding.GOAL_Y
        ]
        fitting = d3il.select(candidates, [mode])
        if len(fitting) < per_mode:
            raise UserError(f"only {len(fitting)} of {len(paths)} plans through gap {mode} keep their distance")
        made += fitting[:per_mode]
    return made


def save(demonstrations: Sequence[Demonstration], out_dir: Path) -> Episodes:
    """Writes train.npz and normalization.npz, scaled by these demonstrations' own ranges; returns them unscaled."""
    raw = d3il.as_episodes(demonstrations)
    save_scaled(out_dir, raw)
    return raw
