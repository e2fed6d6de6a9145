"""The demonstration behind `make demo`: evaluate, fine-tune, evaluate again, draw."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_rl.cli import app
from diffusion_rl.config.compose import compose_job as compose
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import log_dir
from diffusion_rl.core.programs import as_here
from diffusion_rl.reports.figures import learning_curve
from diffusion_rl.reports.metrics import observed, read_rows
from diffusion_rl.reports.progress import duration, say
from diffusion_rl.training.checkpoint import latest_checkpoint

FINE_TUNE = "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"
EVALUATE = "gym/eval/hopper-v2/eval_diffusion_mlp"

# The budget: everything else is the configuration's own value. An iteration that evaluates does not train; the last
# one (number 30) evaluates, so that the curve ends with a point.
ITERATIONS = 16
FINE_TUNE_OVERRIDES = (f"train.n_train_itr={ITERATIONS}", "train.val_freq=5", f"train.save_model_freq={ITERATIONS}")
# 40 environments for 250 chunks of 4 actions, that is 1000 steps: each finishes at least one episode.
EVALUATE_OVERRIDES = ("env.n_envs=40", "n_steps=250", "seed=1000")
MIN_EPISODES = 20
# Episodes cut short, which show that all parts work and no more.
QUICK_FINE_TUNE = ("env.n_envs=8", "env.max_episode_steps=40", "train.n_steps=25", "train.n_train_itr=2")
QUICK_EVALUATE = ("env.n_envs=4", "n_steps=50", "env.max_episode_steps=200")


class Score(NamedTuple):
    """Mean undiscounted return over `episodes` finished episodes."""

    episode_return: float
    episodes: int


def main(overrides: Sequence[str] = (), quick: bool = False) -> int:
    """Runs the demonstration; `overrides` (Hydra's syntax) go to the fine-tuning. Returns the exit status."""
    overrides = [*(QUICK_FINE_TUNE if quick else ()), *overrides]
    check(overrides)
    began, fewer = time.monotonic(), QUICK_EVALUATE if quick else ()
    folder = log_dir() / "demo" / time.strftime("%Y-%m-%d_%H-%M-%S")
    print("1/4  evaluating the pre-trained Hopper policy", flush=True)
    before = evaluate(folder / "before", overrides=fewer)
    print(f"     return {before.episode_return:.0f}, mean of {before.episodes} episodes", flush=True)
    print("2/4  fine-tuning it with DPPO", flush=True)
    tuned = folder / "fine-tuning"
    with observed(Curve(tuned)):
        run(FINE_TUNE, [*FINE_TUNE_OVERRIDES, *overrides], tuned)
    print("3/4  evaluating the fine-tuned policy on the same seeds", flush=True)
    after = evaluate(folder / "after", checkpoint_of(tuned), fewer)
    print("4/4  drawing the learning curve", flush=True)
    figure = draw(tuned)
    report(before, after, tuned, figure, time.monotonic() - began)
    if quick:
        print("note: episodes were cut short (--quick), so these returns show only that everything runs")
    return 0


class Curve:
    """Draws the learning curve of a run so far with each of its evaluations but the first; says where it lies, once."""

    def __init__(self, logdir: Path):
        self.logdir, self._said = logdir, False

    def __call__(self, row: Mapping[str, Any]) -> None:
        if row.get("kind") != "eval" or not row.get("itr"):
            return
        figure = draw(self.logdir)
        if not self._said:
            say(f"     learning curve so far: {figure} (drawn anew with each evaluation)")
        self._said = True


def check(overrides: Sequence[str]) -> None:
    """Raises UserError for overrides that cannot work, before the first evaluation."""
    app.prepare(compose(FINE_TUNE, [*FINE_TUNE_OVERRIDES, *overrides]))


def run(config_name: str, overrides: Sequence[str], logdir: Path) -> Any:
    """Composes a configuration of cfg/ and runs its loop in the folder `logdir`."""
    return app.run(compose(config_name, [*overrides, f"logdir={logdir}"]))


def evaluate(logdir: Path, checkpoint: Path | None = None, overrides: Sequence[str] = ()) -> Score:
    """Evaluates the pre-trained policy, or that of `checkpoint`."""
    policy = [f"base_policy_path={checkpoint}"] if checkpoint else []
    run(EVALUATE, [*EVALUATE_OVERRIDES, *overrides, *policy], logdir)
    rows = [row for row in read_rows(logdir / "metrics.jsonl") if row.get("kind") == "eval"]
    if not rows or rows[-1].get("episode_return") is None:
        raise UserError(f"{logdir}: the evaluation finished no episode")
    return Score(float(rows[-1]["episode_return"]), int(rows[-1]["episodes"] or 0))  # type: ignore[arg-type]


def checkpoint_of(logdir: Path) -> Path:
    """Returns the newest checkpoint of a run."""
    checkpoint = latest_checkpoint(logdir / "checkpoint")
    if checkpoint is None:
        raise UserError(f"{logdir}/checkpoint holds no checkpoint: the fine-tuning ended before its first one")
    return checkpoint


def draw(logdir: Path) -> Path:
    """Draws the learning curve of a run, in its own folder."""
    output = logdir / "figure" / "learning_curve.png"
    words = shlex.join(["learning_curve", str(logdir), "--output", str(output)])
    return learning_curve([logdir], output, command=as_here(f"python script/make_figures.py {words}"))


def report(before: Score, after: Score, tuned: Path, figure: Path, seconds: float) -> None:
    """Prints what came out."""
    ratio = after.episode_return / before.episode_return
    print(
        f"\n                      return   episodes\n"
        f"before fine-tuning  {before.episode_return:8.1f}   {before.episodes:8d}\n"
        f"after fine-tuning   {after.episode_return:8.1f}   {after.episodes:8d}\n"
        f"after / before      {ratio:8.2f}\n\n"
        f"learning curve  {figure}\n"
        f"run folder      {tuned}\n"
        f"time            {duration(seconds)}"
    )
    if min(before.episodes, after.episodes) < MIN_EPISODES:
        print(f"note: fewer than {MIN_EPISODES} episodes were finished, so these means are rough")
