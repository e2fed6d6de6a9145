"""Replay of what a single call does not show of the PyTorch Diffuser: sampling loops, policies, data, training runs."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.cli import commands
from diffusion_rl.core.ema import ema_update
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseTape
from diffusion_rl.data.episodes import Episodes, split_episodes
from diffusion_rl.data.normalizers import normalizer
from diffusion_rl.data.trajectories import TrajectoryDataset, fit, leaving_goal, without_last_steps
from diffusion_rl.diffusion.guidance import Guide, value_and_gradient
from diffusion_rl.diffusion.inpainting import Known
from diffusion_rl.interop.torch_names import state_dict
from diffusion_rl.methods.diffuser import options
from diffusion_rl.methods.diffuser.model import Diffuser
from diffusion_rl.methods.diffuser.trainer import DiffuserTrainer
from diffusion_rl.methods.diffuser.training import DiffuserSettings, DiffuserTraining
from diffusion_rl.reports import plan_results
from diffusion_rl.training.run_dir import Nowhere
from parity_tests.replay.calls import caster
from parity_tests.replay.case import NotCovered
from parity_tests.replay.compare import Comparison, Mismatch, own_rounding
from parity_tests.replay.diffuser import PRECISIONS, build, conditions, convolutions, load, moments
from parity_tests.replay.files import Cast, Golden, Outputs


def replay(golden: Golden) -> None:
    """By the function that recorded it."""
    runner = golden.meta["runner"]
    if runner not in RUNNERS:
        raise NotCovered(f"{golden.name}: no runner {runner!r} in parity_tests/replay/diffuser_runs.py")
    RUNNERS[runner](golden)


def compare(golden: Golden, dtype: str, suffix: str, ours: Outputs, rung: int, quantity: str) -> None:
    """Every recorded output of one precision."""
    comparison = Comparison(golden.name, rung, dtype)
    for name, value in golden.group("out" + suffix).items():
        if name not in ours:
            raise Mismatch(f"{golden.name} [{dtype}]: ours gives no output {name!r}")
        rounding = own_rounding(golden, "out/" + name)
        comparison.check("out/" + name, ours[name], value, quantity=quantity, rounding=rounding)


# ---------- sampling ----------


def several_calls(golden: Golden) -> None:
    """Variants of one model: other options, the same weights."""
    for dtype, suffix in PRECISIONS:
        if golden.group("out" + suffix):
            with precision(dtype), convolutions(dtype):
                ours: Outputs = {}
                for variant in golden.meta["params"]["variants"]:
                    found = one_call(golden, variant, caster(dtype))
                    ours |= {f"{variant['name']}.{k}": v for k, v in found.items() if v is not None}
            compare(golden, dtype, suffix, ours, 3, "Diffuser's sampling and guidance")


def one_call(golden: Golden, variant: dict[str, Any], cast: Cast) -> Outputs:
    obj = build(variant["spec"])
    weights = golden.weights
    if not isinstance(variant["spec"].get("bundle"), dict):
        load(golden.name, obj, weights)
    else:
        load(golden.name, obj, {k: v for k, v in weights.items() if k.split(".")[0] in variant["spec"]["bundle"]})
    start, end = golden.meta["text"]["draw_range"][variant["name"]]
    draws = [draw for _, draw in golden.draws[start:end]]
    noise = cast(np.stack(draws)) if draws else None
    if "policy" in variant:
        return policy(golden, variant["policy"], obj, noise)
    arguments = [cast(golden.resolve(a)) for a in variant["args"]]
    kwargs = {k: v for k, v in variant["kwargs"].items() if k not in ("verbose", "sample_fn", "guide")}
    method = variant.get("method") or variant["target"].rpartition(".")[2]
    if method == "p_mean_variance":
        x, _, t = arguments
        return moments(obj.p_mean_variance(x, t))
    if method == "guide.gradients":
        x, _, t = arguments
        return dict(zip(("y", "grad"), value_and_gradient(obj.guide.model.value, x, t), strict=True))
    if method == "n_step_guided_p_sample":
        _, x, known, t = arguments
        guide = Guide(obj.guide.model.value, **kwargs)
        known = Known.of(conditions(known), x.shape[1], obj.diffusion.action_dim, x)
        x, values = obj.diffusion.step(x, t, noise[0], known, guide)
        return {"x": x, "y": values}
    diffusion = obj.diffusion if method.startswith("diffusion.") else obj
    with_chain = kwargs.pop("return_chain", False)
    kwargs.pop("horizon", None)  # the noise has it
    guide = Guide(obj.guide.model.value, **kwargs) if "guide" in variant["kwargs"] else None
    sample = tf.function(lambda known, noise: diffusion.sample(known, noise, guide, with_chain), autograph=False)
    return sample(conditions(arguments[0]), noise)._asdict()


def policy(golden: Golden, options: dict[str, Any], obj: Any, noise: Any) -> Outputs:
    """A decision from an observation in the environment's units."""
    lengths = options["path_lengths"]
    fields = {"observations": golden.arrays["in/data_obs"], "actions": golden.arrays["in/data_act"]}
    flat = {k: np.concatenate([rows[:n] for rows, n in zip(v, lengths, strict=True)]) for k, v in fields.items()}
    guide = Guide(obj.guide.model.value, **options["sample"])
    planner = Diffuser(obj.diffusion, fit(flat, options["normalizer"]), guide, options["batch_size"])
    decision = planner.act({0: golden.arrays["in/observation"][None]}, noise)
    plans = {name: value[0] for name, value in decision._asdict().items()}
    return plans | {"action": plans["actions"][0, 0]}


# ---------- data ----------


def field_normalizers(golden: Golden) -> None:
    given = golden.group("in")
    ours: Outputs = {}
    for name in golden.meta["params"]["classes"]:
        fitted = normalizer(name).fit(given["X"])
        ours |= {
            f"{name}.normalize": fitted.normalize(given["x"]),
            f"{name}.unnormalize": fitted.unnormalize(given["y"]),
            f"{name}.unnormalize_in_range": fitted.unnormalize(given["y_in"]),
        }
    recorded = golden.group("out")
    constant = given["X"].min(axis=0) == given["X"].max(axis=0)
    if constant.any() and "SafeLimitsNormalizer" in golden.meta["params"]["classes"]:
        # The reference widens the ranges of all entries where one is constant, ours that entry's: compared is this one,
        # and for the others that they have their own ranges still.
        moving = normalizer("LimitsNormalizer").fit(given["X"][:, ~constant])
        np.testing.assert_array_equal(
            ours["SafeLimitsNormalizer.normalize"][..., ~constant], moving.normalize(given["x"][..., ~constant])
        )
        ours = {k: v[..., constant] for k, v in ours.items() if k in recorded}
        recorded = {k: v[..., constant] for k, v in recorded.items()}
    comparison = Comparison(golden.name, 1, "float32")
    for name, value in recorded.items():
        comparison.check("out/" + name, ours[name], value, quantity="Diffuser's normalizers")
        if ours[name].dtype != value.dtype:
            raise Mismatch(f"{golden.name}: {name} has the type {ours[name].dtype}, the reference's {value.dtype}")


def dataset_of(golden: Golden) -> TrajectoryDataset:
    """Our data set from the recorded flat arrays."""
    params, flat = golden.meta["params"], golden.subgroup("dataset")
    options = {k: v for k, v in params["kwargs"].items() if k not in ("preprocess_fns", "seed")}
    timeouts = flat["timeouts"]
    if "maze2d_set_terminals" in params["kwargs"].get("preprocess_fns", []):
        timeouts = leaving_goal(flat["observations"], np.array(params["target"]))
    names = {"states": "observations", "actions": "actions", "rewards": "rewards", "terminals": "terminals"}
    episodes: Episodes = split_episodes({k: flat[v] for k, v in names.items()}, timeouts, golden.name)
    if "maze2d" in params["env"]:
        episodes = without_last_steps(episodes)
    options.setdefault("horizon", 64)
    if params["class"] == "ValueDataset":
        options.setdefault("discount", 0.99)
    return TrajectoryDataset(episodes, goal=params["class"] == "GoalDataset", **options)


def dataset(golden: Golden) -> None:
    """Every array of the reference's buffer, which has a row of `max_path_length` for each episode, and some items."""
    data, params = dataset_of(golden), golden.meta["params"]
    padding = len(data.transitions) - 1
    steps = np.arange(data.max_path_length)
    inside = steps < data.path_lengths[:, None]
    table = np.where(inside, data.starts[:, None] + steps, padding)
    transitions = data.transitions[table]
    rewards = np.append(data.rewards, 0)[table][..., None]
    ours: Outputs = {
        "indices": np.concatenate([data.windows, data.windows[:, 1:] + data.horizon], axis=1),
        "path_lengths": data.path_lengths,
        "length": len(data),
        "n_episodes": len(data.path_lengths),
        "normed_actions": transitions[..., : data.action_dim],
        "normed_observations": transitions[..., data.action_dim :],
        "rewards": rewards,
    }
    for k in params["items"]:
        item = k % len(data)
        x = data.trajectories(np.array([item]))[0]
        ours[f"item{k}.trajectories"] = x
        ours |= {f"item{k}.conditions.{t}": x[t, data.action_dim :] for t in data.condition_times}
        if data.values is not None:
            ours[f"item{k}.values"] = data.values[item]
    if getattr(data, "value_bounds", None):
        ours["bounds"] = np.array(data.value_bounds)
    recorded = golden.group("out")
    if "next_observations" in recorded:  # the observation after each, which nothing of ours needs
        del recorded["next_observations"]
    comparison = Comparison(golden.name, 1, "float32")
    for name, value in recorded.items():
        if name not in ours:
            raise Mismatch(f"{golden.name}: ours gives no {name}")
        comparison.check("out/" + name, ours[name], value, quantity="Diffuser's data sets")


def moving_average(golden: Golden) -> None:
    params, weights = golden.meta["params"], golden.group("w")
    for dtype, suffix in PRECISIONS:
        average = {k[4:]: v.astype(dtype) for k, v in weights.items() if k.startswith("ema.")}
        for _ in range(params["n"]):
            average = {k: ema_update(v, weights[f"cur.{k}"].astype(dtype), params["beta"]) for k, v in average.items()}
        compare(golden, dtype, suffix, average, 5, "EMA")


# ---------- training ----------


def training(golden: Golden) -> None:
    """A training run on the recorded batches, step by step."""
    for dtype, suffix in PRECISIONS:
        with precision(dtype), convolutions(dtype):
            ours = training_run(golden)
        comparison = Comparison(golden.name, 6, dtype)
        spread = golden.meta["dev_f32_f64"]["out"]  # relative; weights are recorded in float32 only
        for name, value in golden.group("out" + suffix).items():
            if name not in ours:
                raise Mismatch(f"{golden.name} [{dtype}]: ours gives no {name}")
            rounding = own_rounding(golden, "out/" + name) or spread * float(np.abs(value).max())
            if name == "infos":
                value = without_targets(golden, dtype, ours, value)
            comparison.check("out/" + name, ours[name], value, quantity="Diffuser's training runs", rounding=rounding)


def without_targets(golden: Golden, dtype: str, ours: Outputs, recorded: np.ndarray) -> np.ndarray:
    """The infos without those of the targets, which are float32 in the reference's float64 run as well: the data are.
    These are compared here, in that precision."""
    targets = np.array([name.endswith("_targ") for name in golden.meta["text"]["info_keys"]])
    if dtype == "float64" and targets.any():
        comparison = Comparison(golden.name, 1, "float32")
        comparison.check("infos of targets", ours["infos"][:, targets], recorded[:, targets], quantity="targets")
        ours["infos"], recorded = ours["infos"][:, ~targets], recorded[:, ~targets]
    return recorded


def training_run(golden: Golden) -> Outputs:
    params, data = golden.meta["params"], dataset_of(golden)
    model, options = build(params["model"]), dict(params["trainer"])
    load(golden.name, model, {k[6:]: v for k, v in golden.weights.items() if k.startswith("model.")})
    ema = {k: options.pop(k) for k in ("ema_decay", "step_start_ema", "update_ema_every")}
    trainer = DiffuserTrainer(model, data, options.pop("train_lr"), **ema)
    options["batch_size"] = options.pop("train_batch_size")
    del options["save_parallel"]
    rows: dict[str, list[Any]] = {"losses": [], "infos": [], "model_sumnorm": [], "ema_sumnorm": []}
    labels: list[int] = []

    def observe(step: int, losses: np.ndarray, infos: dict[str, np.ndarray]) -> None:
        rows["losses"].extend(losses)
        rows["infos"].extend(np.stack([infos[k] for k in golden.meta["text"]["info_keys"]], axis=1))
        for name, variables in (("model_sumnorm", trainer.variables), ("ema_sumnorm", trainer.averaged)):
            flat = np.concatenate([v.numpy().astype(np.float64).reshape(-1) for v in variables])
            rows[name].append([flat.sum(), np.sqrt((flat * flat).sum())])

    pictures = Pictures()
    tape = NoiseTape(used_draws(golden, options))
    run = DiffuserTraining(
        trainer,
        data,
        tape,
        # one step more, so that the last save, which the reference has not, is not made
        DiffuserSettings(n_train_steps=params["steps"] + 1, **options),
        run_dir=Labels(labels),
        say=lambda line: None,
        renderer=pictures,
        merge=False,
        observer=observe,
    )
    for step in range(params["steps"]):
        run.run(until=step + 1)
    if tape.remaining:
        raise Mismatch(f"{golden.name}: {tape.remaining} recorded draws were not made")
    if sorted({f"state_{label}.pt" for label in labels}) != golden.meta["text"]["files"]:
        raise Mismatch(f"{golden.name}: ours saves {labels}, the reference {golden.meta['text']['files']}")
    average = {f"ema_model.{k}": v for k, v in state_dict(trainer.ema_model).items()}
    return {k: np.array(v) for k, v in rows.items()} | {"step": run.step} | average | pictures.given


class Labels(Nowhere):
    """Keeps what checkpoints would be called."""

    def __init__(self, labels: list[int]):
        super().__init__()
        self.labels = labels

    def remember(self, number: int, tensors: Any, metadata: Any, keep: bool) -> None:
        if keep:
            self.labels.append(number)


class Pictures:
    """Keeps what is to be drawn."""

    def __init__(self) -> None:
        self.given: Outputs = {}

    def composite(self, name: str, observations: np.ndarray, actions: np.ndarray) -> None:
        self.given[f"render.{name}"] = observations


def used_draws(golden: Golden, options: dict[str, Any]) -> list[np.ndarray]:
    """The draws without the permutations that torch's sampler makes at the end of a pass and does not use: they come
    before a smaller batch, or right before the next permutation."""
    draws, kept = golden.draws, []
    for i, (name, draw) in enumerate(draws):
        if name == "torch.randperm" and i + 1 < len(draws):
            following, after = draws[i + 1]
            smaller = following == "torch.randint" and len(after) < options["batch_size"]
            if smaller or (following == "torch.randperm" and not options["sample_freq"]):
                continue
        kept.append(draw)
    return kept


# ---------- commands ----------

# Command lines that fail in the reference and work here: a README of its own has the three dashes, a weight may be a
# fraction, and a name may be given.
WORKS_HERE = (("---horizon", "16"), ("--loss_discount", "0.9"), ("--exp_name", "given"))


@contextlib.contextmanager
def empty_folder() -> Iterator[None]:
    """An empty working directory."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def command_lines(golden: Golden) -> None:
    """The options of every recorded command line; what fails there is one line here."""
    for recorded in golden.meta["text"]["cases"]:
        with empty_folder():
            command_line(golden.name, recorded)


def command_line(name: str, recorded: dict[str, Any]) -> None:
    argv, result = recorded["argv"], recorded["result"]
    arguments = (recorded["experiment"], argv, recorded["default_dataset"], recorded["config"])
    works_here = any(set(pair) <= set(argv) for pair in WORKS_HERE)
    if "error" in result:
        try:
            options.parse(*arguments)
        except UserError:
            return
        if not works_here:
            raise Mismatch(f"{name}: {argv} fails in the reference ({result['error']}), here it passes")
        return
    try:
        parsed = options.parse(*arguments).as_dict()
    except UserError as error:
        if _text_for_a_switch(recorded):
            return  # "yes" for True or False is true in the reference, like every text
        raise Mismatch(f"{name}: {argv} works in the reference: {error}") from error
    for key, value in result["args"].items():
        expected = value["repr"] if isinstance(value, dict) else repr(value)
        if isinstance(value, dict) and value["type"] in ("tuple", "list") and f"--{key}" in argv:
            literal = ast.literal_eval(argv[argv.index(f"--{key}") + 1])  # the reference takes it letter by letter
            expected = repr({"tuple": tuple, "list": list}[value["type"]](literal))
        if repr(parsed.get(key, "nothing")) != expected:
            raise Mismatch(f"{name}: {argv}: {key} is {parsed.get(key)!r}, in the reference {expected}")
    written = sorted(str(path) for path in Path("logs").rglob("*") if path.is_file())
    if written != [path for path in result["files"] if path.startswith("logs/")]:
        raise Mismatch(f"{name}: {argv} writes {written}, the reference {result['files']}")


def _text_for_a_switch(recorded: dict[str, Any]) -> bool:
    settings = options.read_config(recorded["config"])[recorded["experiment"]]["options"]
    switches = [k for k, v in settings.items() if isinstance(v, bool)]
    return any(isinstance(recorded["result"]["args"].get(key), str) for key in switches)


def results(golden: Golden) -> None:
    """The same text for the same tree of results."""
    with empty_folder():
        for name, content in golden.meta["params"]["tree"].items():
            path = Path(name)
            (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_text(content)
        same_text(golden, lambda: commands.read_results(golden.meta["params"]["argv"]))


def table(golden: Golden) -> None:
    """The same text for the published scores, or for those in the recording."""
    text = golden.meta["text"]
    means, errors = plan_results.published()
    if golden.meta["params"].get("means"):
        means, errors = text["means"], text["errors"]
    else:
        for name in plan_results.ALGORITHMS:
            if means[name] != text["means"][name]:
                raise Mismatch(f"{golden.name}: the published scores of {name} are not the reference's")
    same_text(golden, lambda: print(plan_results.latex_table(means, errors)))


def same_text(golden: Golden, prints: Callable[[], None]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        prints()
    ours, theirs = printed.getvalue().splitlines(), golden.meta["text"]["stdout"].splitlines()
    for number, (one, other) in enumerate(itertools.zip_longest(ours, theirs), start=1):
        if one != other:
            raise Mismatch(f"{golden.name}: line {number} is {one!r}, the reference's {other!r}")


RUNNERS: dict[str, Callable[[Golden], None]] = {
    "multi": several_calls,
    "normalizer": field_normalizers,
    "dataset": dataset,
    "ema": moving_average,
    "trainer": training,
    "parser": command_lines,
    "read_results": results,
    "table": table,
}
