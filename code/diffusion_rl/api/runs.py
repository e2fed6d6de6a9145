"""Environments, trainings, evaluations and exports in Python: what the commands do, with values that come back."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.api.policy import LoadedPolicy, load_policy
from diffusion_rl.cli import app
from diffusion_rl.config.compose import CONFIG_ROOT, compose_job, plain_copy, shipped_configs
from diffusion_rl.config.instantiate import flatten
from diffusion_rl.config.schema import near_words
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.envs.interface import Observations, VectorEnv
from diffusion_rl.envs.make import make_vector_env
from diffusion_rl.export import saved
from diffusion_rl.reports.metrics import observed
from diffusion_rl.training import episodes as acting

LONGEST = 1_000_000  # decisions until every episode has to be over
_TASK_LINE = re.compile(r"^\s*- /_base/task: (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Evaluated:
    """Complete episodes: returns [n], steps [n] (decisions of a vector environment, else actions), successes [n] bool,
    or None where the environment does not speak of success."""

    returns: np.ndarray
    steps: np.ndarray
    successes: np.ndarray | None

    @property
    def mean_return(self) -> float:
        """Returns the mean over all episodes."""
        return float(self.returns.mean())

    @property
    def success_rate(self) -> float | None:
        """Returns the share of episodes with success."""
        return None if self.successes is None else float(self.successes.mean())


def make_env(
    task: str, n_envs: int = 1, *, act_steps: int | None = None, seed: int = 0, overrides: Sequence[str] = ()
) -> VectorEnv:
    """Builds environments of a task that ships, stepped together, in raw units (`diffusion_rl.envs.interface`).

    Args:
        task: "hopper-medium-v2", "lift", "avoid_m1", …, or the name of a configuration below cfg/.
        act_steps: actions of a chunk; None: what the task's configuration says.
        overrides: of that configuration, as on the command line ("env.max_episode_steps=300").

    Raises:
        UserError: there is no such task, or its simulator is not installed.
    """
    own = [] if act_steps is None else [f"act_steps={act_steps}"]
    cfg = app.prepare(compose_job(_config_of(task), [*own, *overrides]))
    env = plain_copy(cfg["env"])
    for options in (env.get("wrappers") or {}).values():
        if isinstance(options, dict) and "normalization_path" in options:
            options["normalization_path"] = None
    dims = {name: cfg[name] for name in ("obs_dim", "action_dim", "act_steps")}
    return make_vector_env(env, **dims, seed=seed, n_envs=n_envs)


def _config_of(task: str) -> str:
    """Returns the configuration with a task's environment: that of its evaluation, else of its fine-tuning."""
    names = shipped_configs()
    if task in names:
        return task
    wanted = task.removesuffix("-v2")
    by_task: dict[str, str] = {}
    for stage in ("eval", "finetune"):
        for name in (name for name in names if f"/{stage}/" in name):
            if match := _TASK_LINE.search((CONFIG_ROOT / f"{name}.yaml").read_text(encoding="utf-8")):
                by_task.setdefault(match.group(1), name)
    if wanted in by_task:
        return by_task[wanted]
    raise UserError(f"no task and no configuration is called {task!r}{near_words(task, [*by_task, *names])}")


def train(
    config: str,
    overrides: Sequence[str] = (),
    *,
    folder: str | Path | None = None,
    on_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> Path:
    """Runs a configuration of script/run.py in this process; returns its run folder.

    Args:
        config: name of it, "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp".
        overrides: as on the command line ("train.n_train_itr=5", "logdir=here").
        folder: where a configuration of your own lies; default: cfg/.
        on_row: called with every row of the metrics as it is written.

    Raises:
        UserError: one line with the thing and the cure.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    cfg = compose_job(config, overrides, folder=folder)
    with observed(on_row):
        app.run(cfg, flatten(plain_copy(compose_job(config, folder=folder))))
    return Path(cfg["logdir"])


def evaluate(
    policy: LoadedPolicy | str | os.PathLike[str], env: Any, episodes: int = 10, *, seed: int = 0
) -> Evaluated:
    """Lets a policy act in complete episodes; the same seed gives the same numbers.

    Args:
        policy: loaded, or what `load_policy` takes.
        env: a task's name (see `make_env`), environments made by `make_env`, or a gymnasium environment of your own.
        episodes: how many; number i begins from seed + i.
    """
    policy = policy if isinstance(policy, LoadedPolicy) else load_policy(policy)
    if episodes < 1:
        raise UserError(f"episodes={episodes}: at least one is needed")
    if isinstance(env, str):
        env = make_env(env, min(episodes, 10), act_steps=policy.act_steps, seed=seed, overrides=_history(policy))
        try:
            return _in_vector(policy, env, episodes, seed)
        finally:
            env.close()
    return (
        _in_vector(policy, env, episodes, seed) if isinstance(env, VectorEnv) else _alone(policy, env, episodes, seed)
    )


def _history(policy: LoadedPolicy) -> list[str]:
    return [] if policy.cond_steps == 1 else [f"cond_steps={policy.cond_steps}"]


def _in_vector(policy: LoadedPolicy, venv: VectorEnv, episodes: int, seed: int) -> Evaluated:
    if venv.act_steps != policy.act_steps:
        raise UserError(f"the environments take {venv.act_steps} actions, the policy gives {policy.act_steps}")
    rounds = [_round(policy, venv, seed + begin) for begin in range(0, episodes, venv.n_envs)]
    returns, steps, successes = zip(*rounds, strict=True)
    joined = None if any(one is None for one in successes) else np.concatenate(successes)[:episodes]
    return Evaluated(np.concatenate(returns)[:episodes], np.concatenate(steps)[:episodes], joined)


def _round(policy: LoadedPolicy, venv: VectorEnv, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns returns, steps and, where they are told, successes of an episode of each environment, all [E]."""
    rng, reached, told = NoiseSource(seed), np.zeros(venv.n_envs, bool), False

    def act(number: int, seen: Observations) -> np.ndarray:
        return policy.act({key: seen[key] for key in ("state", "rgb") if key in seen}, rng)

    def note(step: acting.Step) -> None:
        nonlocal reached, told
        if "success" in step.result.infos:
            told, reached = True, reached | (step.alive & step.result.infos["success"])

    first = acting.run(act, venv, venv.reset(acting.seeded_options(seed, venv.n_envs)), LONGEST, note)
    return first.returns, first.steps, reached if told else None


def _alone(policy: LoadedPolicy, env: Any, episodes: int, seed: int) -> Evaluated:
    returns, steps, successes = np.zeros(episodes), np.zeros(episodes, np.int64), np.zeros(episodes, bool)
    known = False
    for i in range(episodes):
        session, over = policy.session(seed + i), False
        observation, _ = env.reset(seed=seed + i)
        while not over:
            observation, reward, terminated, truncated, info = env.step(session.act(observation))
            returns[i] += reward
            steps[i] += 1
            known |= "success" in info
            successes[i] |= bool(info.get("success", False))
            over = terminated or truncated
    return Evaluated(returns, steps, successes if known else None)


def export_policy(
    policy: LoadedPolicy | str | os.PathLike[str], output: str | Path, *, force: bool = False
) -> saved.Exported:
    """Writes a policy as a SavedModel (a folder) or, where `output` ends in .tflite, as a TFLite model of batch 1.

    Raises:
        UserError: it cannot be exported, or there is something at `output` (`force` replaces an export).
    """
    policy = policy if isinstance(policy, LoadedPolicy) else load_policy(policy)
    return policy.export("tflite" if str(output).endswith(".tflite") else "savedmodel", output, force)
