"""Rung 8 of the planners: the authors' code and this repository plan with equal weights, scored over episodes.

    python -m parity_tests.r8_planners --upstream-diffuser PATH --upstream-lite PATH [--logbase logs]
    python -m parity_tests.r8_planners                # verdicts and table from the episodes that are there

The paths are checkouts of Diffuser and of CleanDiffuser (DiffuserLite). Their networks, samplers and guides decide in
the same environments as ours, in the same loop, with the weights that the commands in `curves/planners.yaml` train;
Diffuser for one environment after the other, as its script does. Every side draws its own noise. The verdict is that of
r8_curves.py, over episodes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "code") not in sys.path:
    sys.path.insert(0, str(ROOT / "code"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from diffusion_rl.core.files import write_bytes  # noqa: E402
from diffusion_rl.reports.style import csv_text  # noqa: E402
from parity_tests.r8_curves import RUNS, SIDES, TABLE, Verdict, equivalence, rows_of  # noqa: E402
from parity_tests.surroundings import import_diffuser, make_cleandiffuser_importable  # noqa: E402

COMMAND = "python -m parity_tests.r8_planners"
PROTOCOL, EPISODES, VERDICTS = RUNS / "planners.yaml", RUNS / "planners.csv", TABLE.with_name("planners.md")
COLUMNS = ["case", "side", "episode", "return"]

Returns = dict[str, dict[str, np.ndarray]]  # case -> side -> [episodes]


def protocol() -> dict[str, dict[str, Any]]:
    """Returns the cases that the protocol fixes, by name."""
    cases: dict[str, dict[str, Any]] = yaml.safe_load(PROTOCOL.read_text())
    return cases


def read_returns() -> Returns:
    """Returns the returns of the episodes that were played."""
    found: Returns = {}
    if EPISODES.exists():
        for row in rows_of(EPISODES):
            side = found.setdefault(row["case"], {}).get(row["side"], np.zeros(0))
            found[row["case"]][row["side"]] = np.append(side, float(row["return"]))
    return found


def write_returns(returns: Returns) -> None:
    """Writes a line for each episode, all of them or none."""
    rows: list[Sequence[Any]] = [COLUMNS]
    for case, sides in returns.items():
        rows += [(case, side, i, f"{value:.4f}") for side, values in sides.items() for i, value in enumerate(values)]
    write_bytes(EPISODES, csv_text(rows, COMMAND, "Returns of episodes that were planned").encode())


def verdict(case: Mapping[str, Any], sides: Mapping[str, np.ndarray]) -> Verdict:
    """Returns the verdict of a case over its episodes."""
    return equivalence(*(sides[side] for side in SIDES), case["margin"])


def table(cases: Mapping[str, Mapping[str, Any]], returns: Returns) -> str:
    """Returns the verdicts as a Markdown table."""
    lines = [
        "| case | episodes | PyTorch | here | difference, 90% interval | margin | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sides in returns.items():
        case, v = cases[name], verdict(cases[name], sides)
        counts = " / ".join(str(len(sides[side])) for side in SIDES)
        means, interval = f"{v.theirs:.1f} | {v.ours:.1f}", f"{v.low:+.1f} to {v.high:+.1f}"
        lines.append(f"| {case['title']} | {counts} | {means} | {interval} | {v.margin:g} | {v.word} |")
    return "\n".join(lines)


# ---------- playing ----------


class GenuineDiffuser:
    """The authors' models behind the interface of `methods.diffuser.model.Diffuser`.

    Args:
        sampling: their module of that name.
        diffusion, value: their models.
        normalizers: of "observations" and "actions".
        options: of their sampling.
        batch_size: plans for each environment.
    """

    def __init__(
        self, sampling: Any, diffusion: Any, value: Any, normalizers: Any, options: dict[str, Any], batch_size: int
    ):
        self.diffusion, self.normalizers, self.batch_size = diffusion, normalizers, batch_size
        self.options = {**options, "guide": sampling.ValueGuide(value), "sample_fn": sampling.n_step_guided_p_sample}

    def draw(self, rng: Any, n_envs: int) -> None:
        """Draws nothing: torch does."""

    def act(self, conditions: Mapping[int, np.ndarray], noise: None) -> Any:
        """Plans from observations [E,O] for one environment after the other."""
        import torch

        from diffusion_rl.methods.diffuser.model import Decision

        plans, values = [], []
        for observation in self.normalizers["observations"].normalize(conditions[0]):
            known = torch.from_numpy(observation.astype(np.float32)).repeat(self.batch_size, 1)
            found = self.diffusion({0: known}, verbose=False, **self.options)
            plans.append(found.trajectories.detach().numpy())
            values.append(found.values.detach().numpy())
        split, trajectories = self.diffusion.action_dim, np.stack(plans)
        return Decision(
            self.normalizers["actions"].unnormalize(trajectories[..., :split]),
            self.normalizers["observations"].unnormalize(trajectories[..., split:]),
            np.stack(values),
        )


def genuine_model(description: Mapping[str, Any], model: Any) -> Any:
    """Builds the authors' model of a description, with the weights of ours."""
    import torch

    from diffusion_rl.interop.torch_names import state_dict

    parts = {part: dict(description[part]) for part in ("model", "diffusion")}
    names = {part: options.pop("class").removeprefix("models.") for part, options in parts.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        temporal, diffusion = (importlib.import_module(f"diffuser.models.{each}") for each in ("temporal", "diffusion"))
        sizes = {"cond_dim": parts["diffusion"]["observation_dim"], **parts["model"]}
        network = getattr(temporal, names["model"])(**sizes)
        built = getattr(diffusion, names["diffusion"])(network, **parts["diffusion"])
    weights = {key: torch.from_numpy(np.array(value)) for key, value in state_dict(model).items()}
    missing, unexpected = built.load_state_dict(weights, strict=False)
    networks = [key for key in missing if key.startswith("model.")]
    if networks or unexpected:
        raise ValueError(f"weights that the sides do not share: {[*networks, *unexpected]}")
    return built.eval()


def diffuser_of(case: Mapping[str, Any], side: str, logbase: Path, upstream: Path) -> tuple[Any, Sequence[int]]:
    """Returns the planner of a side of a case of Diffuser, and the widths of its observations and actions."""
    from diffusion_rl.diffusion.guidance import Guide
    from diffusion_rl.methods.diffuser.files import find_state, load_experiment
    from diffusion_rl.methods.diffuser.model import Diffuser
    from diffusion_rl.training.checkpoint import checkpoint_metadata

    folders = [logbase / case["dataset"] / case[part] for part in ("diffusion", "values")]
    models, guidance = [load_experiment(folder) for folder in folders], dict(case["guidance"])
    sizes = models[0].model.observation_dim, models[0].model.action_dim
    if side == "tensorflow":
        guide = Guide(models[1].model.value, **guidance)
        return Diffuser(models[0].model, models[0].normalizers, guide, case["plans"]), sizes
    [sampling] = import_diffuser(str(upstream), "sampling")
    described = [checkpoint_metadata(find_state(folder, "latest")[1])["description"] for folder in folders]
    theirs = [genuine_model(facts, each.model) for facts, each in zip(described, models, strict=True)]
    return GenuineDiffuser(sampling, *theirs, models[0].normalizers, guidance, case["plans"]), sizes


class GenuineLite:
    """The authors' DiffuserLite behind the interface of `methods.diffuser_lite.planner.DiffuserLite`.

    Args:
        ours: planner that has the weights.
        action_dim: A.
        network: arguments of the authors' transformer.
    """

    def __init__(self, ours: Any, action_dim: int, network: Mapping[str, Any]):
        import torch
        from cleandiffuser.diffusion import ContinuousRectifiedFlow
        from cleandiffuser.invdynamic import FancyMlpInvDynamic
        from cleandiffuser.nn_condition import MLPCondition
        from cleandiffuser.nn_diffusion import DiT1d

        from diffusion_rl.interop.torch_names import state_dict

        def given(weights: Any) -> dict[str, Any]:
            return {key: torch.from_numpy(np.array(value)) for key, value in state_dict(weights).items()}

        self.ours, self.levels, width = ours, [], len(ours.means)
        for level in ours.levels:
            parts = (
                DiT1d(width, timestep_emb_type="fourier", **network),
                MLPCondition(1, network["emb_dim"], hidden_dims=[network["emb_dim"]]),
            )
            masks = torch.from_numpy(level.mask), torch.from_numpy(level.weights)
            theirs = ContinuousRectifiedFlow(*parts, *masks, device="cpu")
            for model in (theirs.model, theirs.model_ema):
                model.load_state_dict(given(level.ema))
            theirs.eval()
            self.levels.append(theirs)
        self.inverse = FancyMlpInvDynamic(width, action_dim, 256, torch.nn.Tanh(), add_dropout=True, device="cpu")
        weights = {key.removeprefix("model."): value for key, value in given(ours.inverse).items()}
        self.inverse.model.load_state_dict(weights)
        self.inverse.eval()

    def draw(self, rng: Any, n_envs: int) -> None:
        """Draws nothing: torch does."""

    def act(self, observations: np.ndarray, targets: np.ndarray, noise: None) -> np.ndarray:
        """Returns actions [E,A] for observations [E,O], aiming at returns [E], as the authors' script does."""
        import torch

        acting, count = self.ours.acting, len(observations)
        state = torch.tensor((observations - self.ours.means) / self.ours.stds, dtype=torch.float32)
        priors = [torch.zeros((count, *level.shape)) for level in self.ours.levels]
        priors[0][:, 0] = state
        wanted = torch.tensor(targets, dtype=torch.float32)[:, None]
        for i, level in enumerate(self.levels):
            options = {"w_cfg": acting.guidance[i], "temperature": acting.temperature, "condition_cfg": wanted}
            options |= {"n_samples": count, "sample_steps": acting.steps, "use_ema": True}
            plan, _ = level.sample(priors[i], sample_step_schedule="quad_continuous", **options)
            if i + 1 < len(self.levels):
                priors[i + 1][:, [0, -1]] = plan[:, [0, 1]]
        with torch.no_grad():
            return np.asarray(self.inverse(plan[:, 0], plan[:, 1]).numpy())


def lite_of(case: Mapping[str, Any], side: str, logbase: Path, upstream: Path) -> tuple[Any, Sequence[int]]:
    """Returns the planner of a side of a case of DiffuserLite, and the widths of its observations and actions."""
    from diffusion_rl.cli.diffuser_lite import Pipeline
    from diffusion_rl.methods.diffuser_lite import files

    words = [word for word in case["train"][-1].split()[1:] if not word.startswith("mode=")]
    pipeline = Pipeline("mujoco", [*words, f"results_dir={logbase}", "mode=inference", *case["acting"]])
    fitted = files.load_normalizer(pipeline.folder, dict)
    planner = pipeline.planner("latest", fitted["means"], fitted["stds"])
    if side == "tensorflow":
        return planner, pipeline.dims
    make_cleandiffuser_importable(str(upstream))
    network = {key: getattr(pipeline.options, key) for key in ("emb_dim", "d_model", "n_heads", "depth")}
    return GenuineLite(planner, pipeline.dims[1], network), pipeline.dims


def play(case: Mapping[str, Any], side: str, logbase: Path, upstream: Path) -> np.ndarray:
    """Plays a case's episodes; returns their returns, [episodes]."""
    from diffusion_rl.core.noise import NoiseSource
    from diffusion_rl.envs.make import make_vector_env
    from diffusion_rl.methods.diffuser.planning import run_episodes
    from diffusion_rl.methods.diffuser_lite.acting import run_lite_episodes
    from diffusion_rl.training.episodes import seeded_options

    count, steps, seed = case["episodes"], case["steps"], case["seed"]
    lite = case["checkout"] == "lite"
    if side == "pytorch":
        import torch

        torch.manual_seed(seed)
    planner, sizes = (lite_of if lite else diffuser_of)(case, side, logbase, upstream)
    env = {"name": case["dataset"], "n_envs": count, "max_episode_steps": steps}
    options = {"obs_dim": sizes[0], "action_dim": sizes[1], "act_steps": 1, "seed": seed}
    rng = NoiseSource(seed)
    with contextlib.closing(make_vector_env(env, **options)) as venv:
        if not lite:
            return np.asarray(
                run_episodes(planner, venv, rng, case["dataset"], seed=seed, max_episode_length=steps).returns
            )

        def targets(observations: np.ndarray, returns: np.ndarray) -> np.ndarray:
            return np.full(len(observations), case["target"], np.float32)

        resets = seeded_options(seed, count)
        return np.asarray(run_lite_episodes(planner, venv, rng, targets, limit=steps, reset_options=resets).returns)


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays what is missing where a checkout is given, then reports."""
    cases = protocol()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream-diffuser", type=Path, metavar="PATH", help="checkout of the authors' Diffuser")
    parser.add_argument("--upstream-lite", type=Path, metavar="PATH", help="checkout of CleanDiffuser")
    parser.add_argument("--logbase", type=Path, default=Path("logs"), help="where the protocol's trainings are, or go")
    options = parser.parse_args(arguments)
    returns = read_returns()
    logbase = options.logbase.resolve()
    for name, case in cases.items():
        upstream = getattr(options, f"upstream_{case['checkout']}")
        missing = [side for side in SIDES if side not in returns.get(name, {})] if upstream else []
        for command in case["train"] if missing else ():
            lite = case["checkout"] == "lite"
            where = [f"results_dir={logbase}"] if lite else ["--logbase", str(logbase), "--resume", "auto"]
            subprocess.run([sys.executable, *command.split(), *where], cwd=ROOT, check=True)
        for side in missing:
            returns.setdefault(name, {})[side] = play(case, side, logbase, upstream)
            print(f"{name}, {side}: mean return {returns[name][side].mean():.1f}", flush=True)
            if len(returns[name]) == len(SIDES):
                write_returns(returns)
    if not returns:
        print("no case has been played yet")
        return 0
    text = table(cases, returns)
    about = f"What was trained and played: `parity_tests/curves/planners.yaml`. Made by `{COMMAND}`."
    write_bytes(VERDICTS, f"# Plans of both frameworks\n\n{text}\n\nDifference: ours minus theirs. {about}\n".encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
