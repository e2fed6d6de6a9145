"""What the planners find and leave on disk: models from their descriptions, checkpoints.

A folder of an experiment holds `args.json`, `diff.txt`, `{dataset,model,diffusion,trainer,render}_config.json` (and
the same as `.pkl`, plain dictionaries) and `state_<label>.safetensors`. Folders of the PyTorch Diffuser,
`state_<label>.pt` with their pickled configurations, are read as well; nothing in them is executed.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_rl.config.instantiate import flatten
from diffusion_rl.config.schema import DIFFUSION_STEPS, HORIZON, check_ranges, whole
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file
from diffusion_rl.data.episodes import Episodes, split_episodes
from diffusion_rl.data.locate import find_episodes
from diffusion_rl.data.normalizers import IdentityNormalizer, normalizer
from diffusion_rl.data.trajectories import FIELDS, TrajectoryDataset, leaving_goal, without_last_steps
from diffusion_rl.interop import diffuser_checkpoint
from diffusion_rl.interop.torch_names import load_state_dict
from diffusion_rl.methods.diffuser.action_only import ActionDiffusion
from diffusion_rl.methods.diffuser.kuka import MaskedDiffusion, StackClassification
from diffusion_rl.methods.diffuser.model import NoisyTrajectories, TrajectoryDiffusion, ValueDiffusion
from diffusion_rl.methods.diffuser.options import Options, alike, expand, names_in
from diffusion_rl.networks.stacking import MaskedTemporalUnet, StackClassifier
from diffusion_rl.networks.temporal_unet import ActionTemporalUnet, TemporalUnet, ValueFunction
from diffusion_rl.networks.vit import PATCH
from diffusion_rl.tasks.registry import same_task
from diffusion_rl.training.checkpoint import Checkpoint, checkpoint_metadata, load_checkpoint, require_finite
from diffusion_rl.training.continuation import NEVER, asked_state, refuse_changes, require_state
from diffusion_rl.training.state_files import StateFiles

log = logging.getLogger(__name__)

NETWORKS: dict[str, Callable[..., Any]] = {
    "models.TemporalUnet": TemporalUnet,
    "models.ActionTemporalUnet": ActionTemporalUnet,
    "models.ValueFunction": ValueFunction,
    "models.MaskedTemporalUnet": MaskedTemporalUnet,
    "models.StackClassifier": StackClassifier,
}
DIFFUSIONS: dict[str, Callable[..., NoisyTrajectories]] = {
    "models.GaussianDiffusion": TrajectoryDiffusion,
    "models.ActionDiffusion": ActionDiffusion,
    "models.ValueDiffusion": ValueDiffusion,
    "models.MaskedDiffusion": MaskedDiffusion,
    "models.StackClassification": StackClassification,
}
LOADERS = ("datasets.SequenceDataset", "datasets.GoalDataset", "datasets.ValueDataset")


# ---------- data ----------


def dataset_of(episodes: Episodes, description: Mapping[str, Any]) -> TrajectoryDataset:
    """Builds the data set that a description asks for: `loader`, `env` and arguments of `TrajectoryDataset`."""
    options = {k: v for k, v in description.items() if k not in ("loader", "env", "preprocess_fns", "data_dir")}
    loader, steps = description["loader"], list(description.get("preprocess_fns") or [])
    if loader not in LOADERS:
        raise UserError(f"--loader {loader}: choose one of {', '.join(LOADERS)}")
    if unknown := [step for step in steps if step != "maze2d_set_terminals"]:
        raise UserError(f"--preprocess_fns: {unknown[0]} is unknown here; there is maze2d_set_terminals")
    if str(description["env"]).startswith("maze2d"):
        episodes = _between_goals(episodes, description["env"]) if steps else episodes
        episodes = without_last_steps(episodes)
    return TrajectoryDataset(episodes, goal=loader == "datasets.GoalDataset", **options)


def _between_goals(episodes: Episodes, name: str) -> Episodes:
    """Cuts episodes where the fixed goal of the maze is left."""
    from diffusion_rl.envs.maze2d import goal_of  # needs the simulator

    flat = {k: v for k, v in episodes.arrays().items() if k != "traj_lengths"}
    flat["terminals"] = np.zeros(len(episodes.states), bool)
    return split_episodes(flat, leaving_goal(episodes.states, goal_of(name)), name)


# ---------- models ----------


class Description(NamedTuple):
    """Plain dictionaries that say how to build what an experiment is made of."""

    dataset: dict[str, Any]  # "loader", "env" and further arguments
    model: dict[str, Any]  # "class" (of NETWORKS) and its arguments
    diffusion: dict[str, Any]  # "class" (of DIFFUSIONS) and its arguments

    def build(self) -> NoisyTrajectories:
        """Builds the model with new weights."""
        arguments = {k: v for k, v in self.model.items() if k != "class"}
        network = _named(NETWORKS, self.model["class"], "model")(**arguments)
        arguments = {k: v for k, v in self.diffusion.items() if k != "class"}
        if arguments.get("loss_weights"):
            arguments["loss_weights"] = {int(k): v for k, v in arguments["loss_weights"].items()}
        return _named(DIFFUSIONS, self.diffusion["class"], "diffusion")(network, **arguments)

    def save(self, folder: Path, **others: Mapping[str, Any]) -> None:
        """Writes `<part>_config.json` and `<part>_config.pkl` of its parts and the others."""
        for name, facts in {**self._asdict(), **others}.items():
            text = json.dumps(facts, indent=2, sort_keys=True)
            for suffix, content in (("json", text.encode()), ("pkl", pickle.dumps(json.loads(text)))):
                with atomic_file(folder / f"{name}_config.{suffix}") as file:
                    file.write(content)


def _named(known: Mapping[str, Callable[..., Any]], name: str, what: str) -> Callable[..., Any]:
    if name not in known:
        raise UserError(f"--{what} {name} is unknown: choose one of {', '.join(known)}")
    return known[name]


class ExperimentFiles(StateFiles):
    """States as `state_<label>.safetensors` in an experiment's folder, beside its options and the description.

    Args:
        options: of the experiment; its `savepath` is the folder.
    """

    FOLDERS = False

    def __init__(self, options: Options, description: Description):
        kind = _named(DIFFUSIONS, description.diffusion["class"], "diffusion").KIND  # type: ignore[attr-defined]
        super().__init__(kind, experiment_settings(options), "step")
        self.options, self.description = options, description

    def existing(self, run: Path) -> list[tuple[int, Path]]:
        return list(labelled_states(run).items())

    def newest(self, run: Path) -> Path | None:
        states = labelled_states(run)
        if states and (newest := states[max(states)]).suffix == ".pt":
            raise UserError(f"{newest} has no optimizer state: train anew under another --prefix")
        return super().newest(run)

    def facts(self, number: int) -> dict[str, Any]:
        return {"kind": self.kind, "description": self.description._asdict(), "config": self.options.as_dict()}

    def check(self, checkpoint: Checkpoint, path: Path) -> None:
        """Raises UserError for a checkpoint of another model, other data or another seed."""
        require_state(checkpoint, self.step_key, path)
        require_finite(checkpoint.tensors, path)
        before, now = (_comparable(facts) for facts in (checkpoint.metadata, self.facts(0)))
        refuse_changes({key: value for key, value in before.items() if key in now}, now, path)

    def begin(self, run: Path, last: int) -> None:
        """Writes `args.json`, `diff.txt` and the descriptions."""
        self.options.save()
        options = self.options.as_dict()
        render = {"class": options.get("renderer"), "env": self.options.dataset}
        self.description.save(run, trainer={k: v for k, v in options.items() if k in _TRAINER_KEYS}, render=render)

    def copy(self, run: Path) -> None:
        """Copies the folder to `bucket` with gsutil, if both are there."""
        options = self.options
        if not options.bucket:
            return
        if shutil.which("gsutil") is None:
            print(f"warning: gsutil is not installed, so {options.bucket} gets no copy", flush=True)
            return
        command = ["gsutil", "-m", "rsync", "-r", str(run), f"{options.bucket.rstrip('/')}/{run}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if not options.save_parallel:
            process.wait()


_TRAINER_KEYS = (
    *("batch_size", "learning_rate", "gradient_accumulate_every", "ema_decay", "sample_freq", "save_freq"),
    *("n_train_steps", "n_saves", "n_reference", "save_parallel", "bucket", "lr_decay_steps"),
)


def experiment_settings(options: Options) -> dict[str, Any]:
    """Returns the options of an experiment as the settings of a run, with the names that figures go by."""
    return {"name": options.exp_name, "env_name": options.dataset, **options.as_dict()}


def recorded_seed(options: Options) -> int | None:
    """Returns the seed of the run in the experiment's folder, where the options ask to go on with it."""
    asked, states = asked_state(options.as_dict()), labelled_states(Path(options.savepath))
    if asked in NEVER or not states:
        return None
    path = states.get(int(asked)) if asked.isdigit() else max(states.items())[1]
    config = None if path is None else checkpoint_metadata(path).get("config")
    return (config or {}).get("seed")


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts of a checkpoint that a run goes on with unchanged, flat: seed, data, model and diffusion."""
    seed = (facts.get("config") or {}).get("seed")
    described = flatten(json.loads(json.dumps(facts.get("description") or {})))
    return described if seed is None else {"seed": seed, **described}


class Experiment(NamedTuple):
    """A trained model, ready to plan with."""

    model: Any  # of DIFFUSIONS, with the averaged weights
    normalizers: dict[str, IdentityNormalizer]
    normalizer: str  # name of their class
    epoch: int
    folder: Path
    task: str  # environment or data set that it was trained on
    home_made: bool = False  # its data are this repository's, not D4RL's

    def require_task(self, name: str) -> Experiment:
        """Returns itself. Raises UserError if it was trained on another task than `name`; warns where that is open."""
        same = same_task(self.task, name)
        if same is False:
            raise UserError(f"{self.folder} was trained on {self.task}, which is another task than {name}")
        if same is None:
            log.warning("%s was trained on %s, this plans in %s", self.folder, self.task, name)
        return self


def normalizer_tensors(dataset: TrajectoryDataset) -> dict[str, np.ndarray]:
    """Returns what the normalizers know, for a checkpoint."""
    fitted = dataset.normalizers.items()
    return {f"normalizer.{field}.{k}": v for field, normal in fitted for k, v in normal.arrays.items()}


def load_experiment(*where: str | Path, epoch: str | int = "latest", data_dir: str | None = None) -> Experiment:
    """Loads the averaged model in an experiment's folder.

    Args:
        epoch: label of the checkpoint, or "latest".
        data_dir: of the data set, which checkpoints of the PyTorch Diffuser need for their normalizers.

    Raises:
        UserError: there is no such folder or checkpoint; what there is is listed.
    """
    folder = Path(*where)
    label, path = find_state(folder, epoch)
    if path.suffix == ".pt":
        return _original(folder, label, path, data_dir)
    checkpoint = load_checkpoint(path)
    facts = checkpoint.metadata.get("description")
    if facts is None:
        raise UserError(f"{path} is no checkpoint of a planner (its kind is {checkpoint.metadata.get('kind')})")
    try:
        model, kind = _described_model(facts, checkpoint), normalizer(facts["dataset"]["normalizer"])
        home_made = bool((checkpoint.metadata.get("config") or {}).get("home_made_data"))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: its description is damaged ({error}): use another checkpoint") from error
    weights = checkpoint.select("ema.")
    require_finite(weights, path)
    load_state_dict(model, weights)
    fitted = {field: kind(checkpoint.select(f"normalizer.{field}.")) for field in FIELDS}
    return Experiment(model, fitted, kind.__name__, label, folder, str(facts["dataset"]["env"]), home_made)


def _described_model(facts: Mapping[str, Any], checkpoint: Checkpoint) -> NoisyTrajectories:
    """Builds the model with new weights. Raises UserError where it would be larger than the checkpoint's tensors."""
    description = Description(**facts)
    largest = checkpoint.largest_dimension
    size, sizes = whole(0, largest), whole(0, largest, many=True)
    ranges = dict.fromkeys(
        ("observation_dim", "action_dim", "transition_dim", "dim", "out_dim", "time_dim", "image_dim"), size
    )
    ranges |= {"dim_mults": sizes, "hidden_dims": sizes, "image_shape": whole(1, PATCH * largest, many=True)}
    ranges |= {"horizon": HORIZON, "n_timesteps": DIFFUSION_STEPS}
    for part in (description.model, description.diffusion):
        check_ranges(part, ranges, "{} {}".format)
    mults, width = description.model.get("dim_mults"), description.model.get("dim", 32)
    if mults and (width * max(mults) > largest or len(mults) > len(checkpoint.tensors)):
        raise ValueError("its network is larger than its weights")
    is_value = description.model["class"] == "models.ValueFunction"
    if is_value and description.model["horizon"] > largest * 2 ** len(mults or ()):
        raise ValueError("its horizon is larger than its weights")
    if shape := description.model.get("image_shape"):
        channels, height, width = shape
        if (height // PATCH) * (width // PATCH) > largest or channels > 3 * len(checkpoint.tensors):
            raise ValueError("its pictures are larger than its weights")
    return description.build()


def labelled_states(folder: Path) -> dict[int, Path]:
    """Returns an experiment's checkpoints by their labels, ascending; ours are preferred to those of PyTorch."""
    states: dict[int, Path] = {}
    for path in sorted(folder.glob("state_*"), reverse=True):  # .safetensors after .pt
        if match := re.fullmatch(r"state_(\d+)\.(pt|safetensors)", path.name):
            states.setdefault(int(match[1]), path)
    return dict(sorted(states.items()))


def find_state(folder: Path, epoch: str | int) -> tuple[int, Path]:
    """Finds label and path of a checkpoint in an experiment's folder."""
    states = labelled_states(folder)
    if not states:
        raise UserError(f"no checkpoint in {folder}{_others(folder)}")
    if epoch == "latest":
        return max(states.items())
    if not str(epoch).isdigit() or int(epoch) not in states:
        raise UserError(
            f"no checkpoint {epoch} in {folder}: there are {', '.join(map(str, sorted(states)))}, or latest"
        )
    return int(epoch), states[int(epoch)]


def only_model(options: Options, key: str, fixed: Collection[str]) -> list[str]:
    """Finds the model that a plan means where none is in the folder that an option names by default.

    Args:
        key: of the option, "diffusion_loadpath" say.
        fixed: names of the options whose values count as they are.

    Returns:
        flags with which the options name the only model that differs from what they name in other options alone; none
        if theirs is there, or there is nothing like it. A model of actions alone may be one of states and actions.

    Raises:
        UserError: there are several; they and the flags that choose are listed.
    """
    values, template, asked = options.as_dict(), options.deferred[key], getattr(options, key)
    where = Path(values.get("loadbase") or options.logbase, options.dataset)
    templates = dict.fromkeys((template, template.replace(":diffusion/actions_", ":diffusion/defaults_")))
    for path in (expand(each, values) for each in templates):
        if labelled_states(where / path):
            return [] if path == asked else _instead(asked, path, [f"--{key}", path])
    for each in templates:
        pattern, found = alike(each, values, fixed), dict[str, dict[str, str]]()
        for folder in sorted({state.parent for state in where.glob("*/" * (asked.count("/") + 1) + "state_*")}):
            path = folder.relative_to(where).as_posix()
            if (match := pattern.fullmatch(path)) and labelled_states(folder):
                found[path] = match.groupdict()
        if len(found) == 1:
            (path, chosen), *_ = found.items()
            flags = [part for name, value in chosen.items() for part in (f"--{name}", value)]
            return _instead(asked, f"{path}, the only one there", flags + [f"--{key}", each] * (each != template))
        if found:
            differing = [name for name in names_in(each) if len({c.get(name) for c in found.values()}) > 1]
            cure = f"choose one with {' and '.join(f'--{name}' for name in differing)}"
            raise UserError(f"no {asked} in {where}; there are {', '.join(found)}: {cure}")
    return []


def _instead(asked: str, taken: str, flags: list[str]) -> list[str]:
    print(f"no {asked}: planning with {taken}")
    return flags


def _others(folder: Path) -> str:
    """Returns experiments beside one that is missing, and the usual cause."""
    near = sorted(f"{p.parent.parent.name}/{p.parent.name}" for p in folder.parent.glob("*/state_*"))
    if not near and folder.parent.name == "values":
        return ": train a value (python scripts/train_values.py), or plan without one (python scripts/plan_unguided.py)"
    if not near:
        return ": train a model first, or point --logbase (--loadbase) to where it is"
    discount = " (--discount chooses among values)" if "_d" in folder.name else ""
    return f"; there are {', '.join(dict.fromkeys(near))}: choose one with --horizon and the like{discount}"


def _original(folder: Path, label: int, path: Path, data_dir: str | None) -> Experiment:
    """Loads a checkpoint of the PyTorch Diffuser."""
    facts = {
        part: diffuser_checkpoint.read_config(folder / f"{part}_config.pkl")
        for part in ("dataset", "model", "diffusion")
    }
    description = Description(**{part: diffuser_checkpoint.described(part, *fact) for part, fact in facts.items()})
    model = description.build()
    weights = diffuser_checkpoint.averaged_weights(path, model.n_timesteps)
    require_finite(weights, path)
    load_state_dict(model, weights)
    dataset = dict(description.dataset)
    data = dataset_of(find_episodes(dataset["env"], data_dir), dataset)
    return Experiment(
        model, data.normalizers, normalizer(dataset["normalizer"]).__name__, label, folder, str(dataset["env"])
    )


def require_compatible(one: Experiment, other: Experiment) -> None:
    """Raises UserError unless two models denoise alike and see the same numbers."""
    for what, a, b in (
        ("normalizers", one.normalizer, other.normalizer),
        ("denoising steps", one.model.n_timesteps, other.model.n_timesteps),
        ("widths", one.model.transition_dim, other.model.transition_dim),
    ):
        if a != b:
            raise UserError(f"{one.folder} and {other.folder} have different {what} ({a} and {b}): train them alike")
