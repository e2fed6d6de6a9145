"""Learning curves: the numbers drawn, how runs are grouped, and what is said to someone who names a wrong folder."""

import csv
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.video import VideoWriter
from diffusion_rl.reports import figures
from diffusion_rl.reports import runs as run_tables
from diffusion_rl.reports.metrics import MetricsWriter
from diffusion_rl.reports.pictures import GAP, animation

SCRIPT = Path(__file__).resolve().parents[1] / "script" / "make_figures.py"


def make_run(root, name="hopper_ppo", task="hopper-medium-v2", seed=42, returns=(1.0, 2.0, 3.0), kind="eval"):
    folder = root / name / f"2026-01-01_00-00-00_{seed}"
    with MetricsWriter(folder, tensorboard=False) as metrics:
        for itr, value in enumerate(returns):
            metrics.write({"itr": itr, "kind": kind, "env_steps": itr * 80000, "episode_return": value})
    (folder / "config.yaml").write_text(f"name: {name}\nenv_name: {task}\nseed: {seed}\n")
    return folder


def read_csv(path):
    lines = path.read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def png_text(path):
    """The tEXt entries of a PNG, found by walking its chunks."""
    data, position, found = path.read_bytes(), 8, {}
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        if data[position + 4 : position + 8] in (b"tEXt", b"iTXt"):
            key, _, text = data[position + 8 : position + 8 + length].partition(b"\0")
            found[key.decode()] = text.decode("latin-1")
        position += 12 + length
    return found


def test_mean_and_interval_by_hand():
    # Three seeds 1, 2, 3: mean 2, standard deviation 1, half width 4.303 / sqrt(3) = 2.4843 (Student, 2 degrees).
    # Two seeds 1, 3: mean 2, deviation sqrt(2), half width 12.706 * sqrt(2) / sqrt(2) = 12.706.
    values = np.array([[1.0, 1.0, 5.0], [2.0, 3.0, np.nan], [3.0, np.nan, np.nan]])
    mean, low, high = run_tables.mean_and_interval(values)
    np.testing.assert_allclose(mean, [2, 2, 5])
    np.testing.assert_allclose(high[:2] - mean[:2], [4.303 / math.sqrt(3), 12.706])
    np.testing.assert_allclose(mean[:2] - low[:2], high[:2] - mean[:2])
    assert math.isnan(low[2]) and math.isnan(high[2])


@pytest.mark.parametrize(("degrees", "exact"), [(1, 12.706), (9, 2.262), (21, 2.0796), (30, 2.0423), (100, 1.9840)])
def test_student_quantiles(degrees, exact):
    assert run_tables.student_t(degrees) == pytest.approx(exact, abs=0.005)


def test_csv_has_the_numbers_of_the_figure_and_the_command(tmp_path):
    folders = [make_run(tmp_path, seed=seed, returns=(1.0 + seed, 2.0 + seed)) for seed in (0, 1, 2)]
    path = figures.learning_curve(folders, tmp_path / "out" / "curve.png", command="python script/make_figures.py x")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert png_text(path)["Description"] == "python script/make_figures.py x"
    assert "# made by: python script/make_figures.py x\n" in path.with_suffix(".csv").read_text()
    rows = read_csv(path.with_suffix(".csv"))
    assert [(row["env_steps"], row["n_seeds"], row["mean"]) for row in rows] == [("0", "3", "2"), ("80000", "3", "3")]
    assert [row["seed_0"] for row in rows] == ["1", "2"] and rows[0]["label"] == "hopper_ppo"
    assert float(rows[0]["high"]) == pytest.approx(2 + 4.303 / math.sqrt(3), rel=1e-5)


def test_same_name_is_one_line_and_labels_rename_or_regroup(tmp_path):
    runs = [run_tables.read_run(make_run(tmp_path, name, seed=seed)) for name in ("a", "b") for seed in (1, 2)]
    assert {key: len(group) for key, group in run_tables.group_runs(runs, None).items()} == {
        ("a", "hopper-medium-v2"): 2,
        ("b", "hopper-medium-v2"): 2,
    }
    assert [key[0] for key in run_tables.group_runs(runs, ["A", "B"])] == ["A", "B"]
    assert [len(group) for group in run_tables.group_runs(runs, ["x", "y", "y", "y"]).values()] == [1, 3]
    with pytest.raises(UserError, match="3 labels for 4 runs with 2 names"):
        run_tables.group_runs(runs, ["x", "y", "z"])


def test_tasks_are_never_averaged_with_each_other(tmp_path):
    runs = [make_run(tmp_path, "h", "hopper-medium-v2"), make_run(tmp_path, "w", "walker2d-medium-v2")]
    path = figures.learning_curve(runs, tmp_path / "c.png", labels=["ours", "ours"])
    assert [row["task"] for row in read_csv(path.with_suffix(".csv"))] == ["hopper-medium-v2"] * 3 + [
        "walker2d-medium-v2"
    ] * 3


def test_a_seed_that_was_run_twice_counts_twice(tmp_path):
    runs = [make_run(tmp_path / which, seed=42, returns=(value,)) for which, value in (("x", 1.0), ("y", 3.0))]
    (row,) = read_csv(figures.learning_curve(runs, tmp_path / "c.png").with_suffix(".csv"))
    assert (row["n_seeds"], row["mean"], row["seed_42"], row["seed_42 (2)"]) == ("2", "2", "1", "3")


def test_a_figure_is_drawn_again_from_its_table(tmp_path):
    folders = [make_run(tmp_path, seed=seed, returns=(1.0 + seed, 2.0 + seed)) for seed in (0, 1, 2)]
    first = figures.learning_curve(folders, tmp_path / "first.png").with_suffix(".csv")
    second = figures.learning_curve([first], tmp_path / "second.png").with_suffix(".csv")
    assert read_csv(first) == read_csv(second) and len(read_csv(first)) == 2
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is no table of curves"):
        figures.learning_curve([tmp_path / "other.csv"], tmp_path / "third.png")


def test_a_caption_says_what_is_seen_the_seeds_and_the_command(tmp_path):
    folders = [make_run(tmp_path, "hopper-medium-v2_ppo_diffusion_mlp_ta4", seed=seed) for seed in (3, 5)]
    lines = figures.learning_curve(folders, tmp_path / "c.png", command="python x").with_suffix(".txt").read_text()
    assert "Seeds, hopper-medium-v2: 3, 5 of DPPO\n" in lines and lines.endswith("Made by: python x\n")


def test_a_seed_that_ends_early_does_not_turn_the_line_back(tmp_path):
    long, short = make_run(tmp_path, seed=1, returns=(1.0, 2.0, 3.0)), make_run(tmp_path, seed=2, returns=(1.0, 2.0))
    rows = [{"itr": i, "kind": "eval", "env_steps": n, "episode_return": 1.0} for i, n in enumerate((0, 400000))]
    (short / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = read_csv(figures.learning_curve([long, short], tmp_path / "c.png").with_suffix(".csv"))
    steps = [float(row["env_steps"]) for row in drawn]
    assert len(steps) == 3 and steps == sorted(steps)


def test_rows_without_a_return_and_a_shorter_seed_are_fine(tmp_path):
    runs = [
        make_run(tmp_path, seed=1, returns=(math.nan, 2.0, 4.0), kind="train"),
        make_run(tmp_path, seed=2, returns=(math.nan, 4.0), kind="train"),
    ]
    rows = read_csv(figures.learning_curve(runs, tmp_path / "c.png").with_suffix(".csv"))
    assert [(row["itr"], row["n_seeds"], row["mean"]) for row in rows] == [("1", "2", "3"), ("2", "1", "4")]


def test_a_run_folder_without_a_config_is_named_after_its_folder(tmp_path):
    folder = make_run(tmp_path, "some_name", seed=7)
    (folder / "config.yaml").unlink()
    run = run_tables.read_run(folder)
    assert (run.name, run.seed, run.task) == ("some_name", "7", "")


def command(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize(("ending", "begins"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_figure_for_a_paper(tmp_path, ending, begins):
    path = figures.learning_curve([make_run(tmp_path)], tmp_path / f"curve.{ending}", command="how it was made")
    content = path.read_bytes()
    assert content.startswith(begins) and b"how it was made" in content and path.with_suffix(".csv").is_file()
    with pytest.raises(UserError, match=r"a figure ends in \.png, \.pdf, \.svg"):
        figures.learning_curve([make_run(tmp_path, seed=5)], tmp_path / "curve.jpg")


def test_the_command_prints_what_it_wrote(tmp_path):
    folder = make_run(tmp_path)
    ended = command("learning_curve", folder, "--output", tmp_path / "curve.png", "--label", "ours")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [str(tmp_path / "curve.png"), str(tmp_path / "curve.csv")]
    assert f"--output {tmp_path}/curve.png --label ours" in png_text(tmp_path / "curve.png")["Description"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no such run folder"),
        (lambda folder: folder.mkdir(), "no metrics.jsonl in it"),
        (lambda folder: MetricsWriter(folder, tensorboard=False).close(), "hold no rows with both env_steps and"),
    ],
)
def test_a_wrong_folder_is_one_line_and_exit_status_2(tmp_path, prepare, message):
    folder = tmp_path / "run"
    prepare(folder)
    ended = command("learning_curve", folder, "--output", tmp_path / "out" / "curve.png")
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and message in ended.stderr and str(folder) in ended.stderr
    assert not (tmp_path / "out").exists()


# Videos


@pytest.fixture
def videos(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    paths = [tmp_path / f"{name}.mp4" for name in ("up", "down")]
    for path, levels in zip(paths, (range(0, 250, 10), range(240, -1, -10)), strict=True):
        writer = VideoWriter(path, fps=20)
        for level in levels:
            writer.add(np.full((32, 48, 3), level))
        writer.close()
    return paths


def test_an_animation_shows_videos_side_by_side(tmp_path, videos):
    image = pytest.importorskip("PIL.Image").open(animation(videos, tmp_path / "both.gif", every=6, height=16))
    assert (image.size, image.n_frames, image.info["duration"]) == ((2 * 24 + GAP, 16), 5, 300)
    image.seek(4)
    last = np.asarray(image.convert("RGB")).astype(int)
    np.testing.assert_allclose([last[8, 12].mean(), last[8, 40].mean()], [240, 0], atol=12)


def test_a_contact_sheet_shows_first_and_last_frame(tmp_path, videos):
    imageio = pytest.importorskip("imageio.v2")
    output = tmp_path / "sheets" / "sheet.png"
    command = [sys.executable, SCRIPT, "contact_sheet", *videos, "--columns", "3", "--output", output]
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.strip() == str(output), ended.stderr
    sheet = imageio.imread(output)[..., :3].astype(int)
    assert sheet.shape == (2 * 32 + GAP, 3 * 48 + 2 * GAP, 3)
    levels = [[sheet[y, x].mean() for x in (24, 76, 128)] for y in (16, 52)]
    np.testing.assert_allclose(levels, [[0, 120, 240], [240, 120, 0]], atol=8)
    assert "contact_sheet" in png_text(output)["Description"]
    wrong = subprocess.run([sys.executable, SCRIPT, "contact_sheet", __file__], capture_output=True, text=True)
    assert wrong.returncode == 2 and "cannot be read as a video" in wrong.stderr
