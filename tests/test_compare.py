"""Algorithms beside each other: interquartile means, published curves, labels, tables and messages."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_figures import make_run, png_text, read_csv

from diffusion_rl.config.compose import compose, shipped_configs
from diffusion_rl.reports import compare as comparison
from diffusion_rl.reports import published
from diffusion_rl.reports.runs import Run, class_labels, iqm_and_interval, read_run

SCRIPT = Path(__file__).resolve().parents[1] / "script" / "make_figures.py"
DPPO = "hopper-medium-v2_ppo_diffusion_mlp_ta4_td20_tdf10"


def test_interquartile_mean_by_hand():
    values = np.array([[0.0, 4.0], [10.0, 2.0], [20.0, 1.0], [1000.0, 3.0]])
    iqm, low, high = iqm_and_interval(values)
    np.testing.assert_array_equal(iqm, [15.0, 2.5])  # the middle two of four
    # Resampling 4 seeds, the middle two of a sample are at most 1000 and at least 0.
    assert (low >= [0, 1]).all() and (low < iqm).all() and (iqm < high).all() and (high <= [1000, 4]).all()


def test_interquartile_means_and_intervals_are_those_of_rliable():
    library = pytest.importorskip("rliable.library")
    metrics = pytest.importorskip("rliable.metrics")
    values = np.random.default_rng(1).normal(size=(10, 3))
    iqm, low, high = iqm_and_interval(values)
    for point in range(3):
        scores = {"": values[:, [point]]}
        centre, interval = library.get_interval_estimates(
            scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=20000
        )
        assert iqm[point] == pytest.approx(centre[""][0])
        np.testing.assert_allclose([low[point], high[point]], interval[""][:, 0], atol=0.1)  # of resampling


def test_intervals_are_the_same_in_every_call_and_hold_the_true_mean_about_95_times_in_100():
    samples = np.random.default_rng(0).normal(size=(10, 200))  # 200 experiments of 10 seeds, true mean 0
    _, low, high = iqm_and_interval(samples)
    again = iqm_and_interval(samples)
    np.testing.assert_array_equal(low, again[1])
    np.testing.assert_array_equal(high, again[2])
    covered = np.mean((low < 0) & (high > 0))
    assert 0.82 < covered <= 1.0, covered  # percentile intervals of so few seeds are somewhat narrow


def test_a_point_uses_the_seeds_that_have_it():
    values = np.array([[1.0, 1.0, 1.0], [2.0, 2.0, np.nan], [3.0, np.nan, np.nan]])
    iqm, low, high = iqm_and_interval(values)
    np.testing.assert_array_equal(iqm, [2.0, 1.5, 1.0])
    assert not np.isnan(low[0]) and np.isnan(low[1:]).all() and np.isnan(high[1:]).all()


def test_published_numbers():
    curves, finals = published.curves(), published.final_values()
    assert len(curves) == 62 and sum(len(curve.values) for curve in curves.values()) == 597
    assert len(finals) == 62
    assert finals["hopper", "DPPO"] == published.FinalValue(10_000_000, 2566.0, 2560.0)
    assert finals["lift", "DPOER"].original is None
    np.testing.assert_array_equal(curves["hopper", "DPPO"].env_steps[:2], [720000, 1440000])
    for (task, algorithm), curve in curves.items():
        assert (np.diff(curve.env_steps) > 0).all() and curve.env_steps[-1] <= finals[task, algorithm].env_steps
        if published.metric_of(task) == "success_rate":
            assert (curve.values >= 0).all() and (curve.values <= 1).all()
    for name in ("curves.csv", "final_values.csv"):
        text = (Path(published.__file__).parent / name).read_text()
        assert "Reading error: about 20 in the return, 0.01 in the success rate" in text


def run_of(name, task="hopper-medium-v2", seed="0"):
    return Run(Path(name), name, task, seed, [])


@pytest.mark.parametrize(
    ("name", "label"),
    [
        (DPPO, "DPPO"),
        ("hopper-medium-v2_awr_diffusion_mlp_ta4_td20", "DAWR"),
        ("hopper-medium-v2_sac_ppo_diffusion_mlp_ta4_td20_tdf10", "DPOER"),
        ("hopper-medium-v2_ppo_gaussian_mlp_ta4", "Gaussian PPO"),
        ("hopper-medium-v2_rlpd_mlp_ta1", "RLPD"),
        ("hopper-medium-v2_ppo_exact_diffusion_mlp_ta4", "DPPO (exact)"),
        (f"{DPPO},train.gamma=0.9", "DPPO train.gamma=0.9"),
        ("mine", "mine"),
    ],
)
def test_algorithms_by_the_papers_names(name, label):
    assert comparison.algorithm_labels([run_of(name)]) == [label]


@pytest.mark.parametrize("config", [name for name in shipped_configs() if "/finetune/" in name])
def test_every_fine_tuning_run_has_the_label_of_its_algorithm(config):
    """Runs of the algorithms that have several names in one task keep them: they are different experiments."""
    cfg = compose(config)
    run = Run(Path(cfg.name), cfg.name, cfg.env_name, "0", [], cfg.model._target_.rpartition(".")[2])
    assert comparison.algorithm_labels([run]) == [class_labels()[run.algorithm]]


def test_the_class_of_the_model_is_read_from_the_configuration(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"itr": 0, "kind": "eval", "env_steps": 0, "episode_return": 1.0}\n')
    model = "{_target_: diffusion_rl.methods.on_policy.dpoer.DPOER}"
    (tmp_path / "config.yaml").write_text(f"name: anything\nmodel: {model}\n")
    assert comparison.algorithm_labels([read_run(tmp_path)]) == ["DPOER"]


def test_both_published_curves_of_dpoer_are_its():
    assert comparison._references("hopper", "env_steps", "episode_return", ["DPOER"], "same") == ["DPOER", "DPOER_50"]
    assert comparison._references("hopper", "env_steps", "episode_return", ["DPPO"], "same") == ["DPPO"]


def test_different_experiments_are_never_taken_for_seeds_of_one():
    runs = [run_of(DPPO), run_of(DPPO, seed="1"), run_of(DPPO.replace("tdf10", "tdf5"))]
    assert comparison.algorithm_labels(runs[:2]) == ["DPPO", "DPPO"]
    assert comparison.algorithm_labels(runs) == ["ppo_diffusion_mlp_ta4_td20_tdf10"] * 2 + [
        "ppo_diffusion_mlp_ta4_td20_tdf5"
    ]


def test_tasks_by_the_papers_names():
    assert [comparison.task_of(name) for name in ("hopper-medium-v2", "lift", "avoiding-m5", "")] == [
        *("hopper", "lift", "avoiding-m5", "")
    ]


def figure_of(tmp_path, **options):
    """Two tasks, two algorithms, three and two seeds."""
    runs = [make_run(tmp_path, DPPO, seed=seed, returns=(1000.0, 2000.0 + seed)) for seed in (0, 1, 2)]
    runs += [make_run(tmp_path, "hopper-medium-v2_mine", seed=seed, returns=(1.0, 2.0 + seed)) for seed in (0, 1)]
    name = DPPO.replace("hopper", "walker2d")
    runs += [make_run(tmp_path, name, "walker2d-medium-v2", returns=(3.0,))]
    return comparison.compare(runs, tmp_path / "out" / "figure.png", command="python x", **options)


def test_the_figure_has_its_numbers_command_and_published_values_beside_it(tmp_path):
    path, tables = figure_of(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and png_text(path)["Description"] == "python x"
    text = path.with_suffix(".csv").read_text()
    assert "interquartile mean" in text.splitlines()[0] and "# made by: python x\n" in text
    rows = read_csv(path.with_suffix(".csv"))
    ours = [row for row in rows if row["kind"] == "eval"]
    assert [(row["task"], row["label"], row["n_seeds"]) for row in ours] == [
        *([("hopper", "DPPO", "3")] * 2),
        *([("hopper", "mine", "2")] * 2),
        ("walker2d", "DPPO", "1"),
    ]
    assert (ours[1]["iqm"], ours[1]["seed_2"], ours[3]["iqm"], ours[3]["low"]) == ("2001", "2002", "2.5", "")
    assert 2000 <= float(ours[1]["low"]) < 2001 < float(ours[1]["high"]) <= 2002
    theirs = [row for row in rows if row["kind"] == "published replication" and row["task"] == "hopper"]
    curve = published.curves()["hopper", "DPPO"]
    assert [float(row["env_steps"]) for row in theirs] == list(curve.env_steps)
    assert [float(row["iqm"]) for row in theirs] == list(curve.values)
    final = {(row["task"], row["kind"]): row["iqm"] for row in rows if "(final)" in row["kind"]}
    assert final["hopper", "published original (final)"] == "2560"
    assert final["walker2d", "published replication (final)"] == "3460"
    assert "DAWR" not in text


def test_tables(tmp_path):
    _, tables = figure_of(tmp_path)
    markdown, latex = tables.split("\n\n")
    lines = markdown.splitlines()
    assert lines[2].startswith("| hopper | DPPO | 3 | 80000 | 2001 [2000, 2002] | 10000000 | 2566 | 2560 |")
    assert lines[3] == "| hopper | mine | 2 | 80000 | 2 | – | – | – |"
    assert len({line.count("|") for line in lines}) == 1
    assert r"IQM [95\% interval]" in latex and latex.count(r" \\") == 4 and r"\end{tabular}" in latex


def test_which_published_values(tmp_path):
    none, _ = figure_of(tmp_path, references="none")
    assert "published" not in none.with_suffix(".csv").read_text()
    every, _ = figure_of(tmp_path, references="all", tasks=["hopper-medium-v2"])
    labels = {row["label"] for row in read_csv(every.with_suffix(".csv")) if "published" in row["kind"]}
    assert {"DAWR", "DPPO", "DPOER_50", "QSM"} < labels
    assert {row["task"] for row in read_csv(every.with_suffix(".csv"))} == {"hopper"}
    by_iteration, _ = figure_of(tmp_path, x="itr")
    assert "published" not in by_iteration.with_suffix(".csv").read_text()


def test_labels_rename_or_regroup(tmp_path):
    path, _ = figure_of(tmp_path, labels=["ours", "another", "ours"])  # one for each name
    labels = [row["label"] for row in read_csv(path.with_suffix(".csv"))]
    assert labels == ["ours"] * 2 + ["another"] * 2 + ["ours"]


def test_success_rates_are_drawn_where_they_are_what_is_published(tmp_path):
    folder = tmp_path / "lift_ppo_diffusion_mlp_ta4_td20_tdf10" / "2026-01-01_00-00-00_0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {folder.parent.name}\nenv_name: lift\nseed: 0\n")
    (folder / "metrics.jsonl").write_text('{"itr": 0, "kind": "eval", "env_steps": 10, "success_rate": 0.5}\n')
    path, tables = comparison.compare([folder], tmp_path / "f.png")
    assert "| lift | DPPO | 1 | 10 | 0.500 | 3000000 | 0.995 | 0.990 |" in tables


def command(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_the_command(tmp_path):
    folder = make_run(tmp_path, DPPO)
    output = tmp_path / "figure.png"
    ended = command("compare", "--task", "hopper", folder, "--output", output, "--table")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[:2] == [str(output), str(output.with_suffix(".csv"))]
    assert lines[3].startswith("| task |") and lines[-1] == r"\end{tabular}"
    assert f"compare --task hopper {folder}" in png_text(output)["Description"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "walker2d"], "--task walker2d: none of the run folders is of it (they are of hopper)"),
        (["--kind", "train"], "hold no train rows with both env_steps and episode_return"),
        (["--y", "success_rate"], "hold no eval rows with both env_steps and success_rate"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_exit_status_2(tmp_path, options, message):
    folder = make_run(tmp_path, DPPO)
    ended = command("compare", folder, "--output", tmp_path / "out" / "figure.png", *options)
    assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_published_files_are_tables():
    for name in ("curves.csv", "final_values.csv"):
        lines = (Path(published.__file__).parent / name).read_text().splitlines()
        rows = list(csv.reader(line for line in lines if not line.startswith("#")))
        assert len({len(row) for row in rows}) == 1
