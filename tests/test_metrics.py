"""The record of a run: whole lines whatever happens, a csv that is valid at any moment, resuming, wandb left alone."""

import csv
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from diffusion_rl.core.errors import UserError
from diffusion_rl.reports.metrics import MetricsWriter, read_rows, wandb_is_on
from diffusion_rl.reports.progress import Progress, duration


def rows_of_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def writer(folder, **kwargs):
    return MetricsWriter(folder, tensorboard=False, **kwargs)


def test_rows_are_the_same_in_jsonl_and_csv(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write({"itr": 0, "kind": "train", "env_steps": np.int64(80000), "loss": np.float32(0.5)})
        metrics.write({"itr": 0, "kind": "eval", "episode_return": np.array(1400.25), "note": 'a "quoted", word'})
        metrics.write({"itr": 1, "kind": "train", "env_steps": 160000, "loss": math.nan})
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"itr": 0, "kind": "train", "env_steps": 80000, "loss": 0.5},
        {"itr": 0, "kind": "eval", "episode_return": 1400.25, "note": 'a "quoted", word'},
        {"itr": 1, "kind": "train", "env_steps": 160000, "loss": None},
    ]
    table = rows_of_csv(tmp_path / "metrics.csv")
    assert list(table[0]) == ["itr", "kind", "env_steps", "loss", "episode_return", "note"]
    assert [row["loss"] for row in table] == ["0.5", "", ""]
    assert table[1]["note"] == 'a "quoted", word'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_json_cannot_say_becomes_null(tmp_path, value):
    with writer(tmp_path) as metrics:
        metrics.write({"itr": 0, "loss": value})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"itr": 0, "loss": null}\n'


def test_a_value_that_is_no_number_is_refused_and_nothing_is_written(tmp_path):
    with writer(tmp_path) as metrics, pytest.raises(TypeError, match="'loss'"):
        metrics.write({"itr": 0, "loss": np.zeros(3)})
    assert read_rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"itr": 2, "lo', b"\x00\x00\x00", b'{"itr": 2, "lo\n', b'{"itr": 2}'])
def test_a_torn_last_line_is_dropped_when_the_run_is_opened_again(tmp_path, torn):
    with writer(tmp_path) as metrics:
        metrics.write({"itr": 0, "loss": 1.0})
        metrics.write({"itr": 1, "loss": 2.0})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert [row["itr"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]
    with writer(tmp_path) as metrics:
        metrics.write({"itr": 2, "loss": 3.0})
    assert [json.loads(line)["itr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert [row["itr"] for row in rows_of_csv(tmp_path / "metrics.csv")] == ["0", "1", "2"]


def test_damage_in_the_middle_is_named_and_nothing_is_thrown_away(tmp_path):
    content = b'{"itr": 0}\n{"itr"\n{"itr": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="line 2 is damaged"):
        writer(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_truncate_keeps_what_the_checkpoint_has_seen(tmp_path):
    metrics = writer(tmp_path)
    for itr in range(5):
        metrics.write({"itr": itr, "kind": "train", "loss": float(itr)})
    metrics.write({"itr": 4, "kind": "eval", "episode_return": 1.0})
    metrics.truncate(2)
    metrics.write({"itr": 3, "kind": "train", "loss": 30.0})
    metrics.close()
    assert [(row["itr"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    table = rows_of_csv(tmp_path / "metrics.csv")
    assert list(table[0]) == ["itr", "kind", "loss"] and [row["itr"] for row in table] == ["0", "1", "2", "3"]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "metrics.csv"}


def test_epochs_count_as_steps(tmp_path):
    with writer(tmp_path) as metrics:
        for epoch in range(1, 4):
            metrics.write({"epoch": epoch, "loss": 0.1})
        metrics.truncate(1)
    assert [row["epoch"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


KILLED = """
import sys
from diffusion_rl.reports.metrics import MetricsWriter
metrics = MetricsWriter(sys.argv[1], tensorboard=False)
first = len(metrics.rows)
print("ready", flush=True)
for itr in range(first, first + 10**9):
    row = {"itr": itr, "kind": "train", "text": "x" * (itr % 300), **{f"value_{k}": itr / 7 for k in range(itr % 5)}}
    if itr % 50 == 0 and itr < 2000:
        row[f"new_{itr}"] = 1.5  # a new column: the csv is rewritten
    metrics.write(row)
"""


def test_sigkill_at_any_moment_leaves_whole_lines_and_a_valid_csv(tmp_path):
    """Fifteen writers are killed in the same folder, each going on where the one before was cut off."""
    rng = random.Random(0)
    for _ in range(15):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ}
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        assert [json.loads(line)["itr"] for line in lines] == list(range(len(lines)))
        assert all(line.endswith(b"\n") for line in lines)
        if (tmp_path / "metrics.csv").exists():
            table = rows_of_csv(tmp_path / "metrics.csv")
            assert [row["itr"] for row in table] == [str(k) for k in range(len(table))]
            assert None not in set().union(*table) and len(lines) - 1 <= len(table) <= len(lines)
    assert len(lines) > 100
    writer(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "metrics.csv"}


FILLED = """
import sys
from diffusion_rl.core.errors import UserError
from diffusion_rl.reports.metrics import MetricsWriter, read_rows
metrics = MetricsWriter(sys.argv[1], tensorboard=False)
try:
    for itr in range(10000):
        metrics.write({"itr": itr, "loss": itr / 7, "text": "x" * 300})
except UserError as error:
    print(error)
rows = read_rows(sys.argv[1] + "/metrics.jsonl")
lines = open(sys.argv[1] + "/metrics.jsonl", "rb").read().splitlines(keepends=True)
assert [row["itr"] for row in rows] == list(range(len(lines))) and len(rows) in (itr, itr + 1) and itr > 20
table = open(sys.argv[1] + "/metrics.csv", "rb").read()
assert table.endswith(b"\\n") and itr <= table.count(b"\\n") <= itr + 2
"""
PRIVATE_MOUNT = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


def test_a_full_disk_is_one_clear_line_and_the_files_end_with_a_whole_row(tmp_path):
    """A real one: a file system of 64 kB, mounted for this process only."""
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    try:
        allowed = subprocess.run([*PRIVATE_MOUNT, mount], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this system does not let a user mount a file system of his own (unshare --user --mount)")
    command = [*PRIVATE_MOUNT, f'{mount} && exec "$0" -c "$1" {tmp_path}', sys.executable, FILLED]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.count("\n") == 1 and "the disk is full" in ended.stdout, ended.stderr
    assert ended.returncode == 0, ended.stderr


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, float(np.ravel(_tensor(event))[0])) for event in accumulator.Tensors(tag)]
        for tag in accumulator.Tags()["tensors"]
    }


def _tensor(event):
    from tensorboard.util.tensor_util import make_ndarray

    return make_ndarray(event.tensor_proto)


def test_tensorboard_shows_the_kept_rows_only(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for itr in range(4):
            metrics.write({"itr": itr, "kind": "train", "loss": 0.5 * itr, "name": "text is left out", "bad": math.nan})
        metrics.write({"itr": 3, "kind": "eval", "episode_return": 7})
        metrics.truncate(1)
        metrics.write({"itr": 2, "kind": "eval", "episode_return": 8})
    assert events(tmp_path / "tensorboard") == {
        "train/loss": [(0, 0.0), (1, 0.5)],
        "eval/episode_return": [(2, 8.0)],
    }


def test_neither_wandb_nor_tensorflow_is_imported_when_off(tmp_path):
    program = (
        "import sys\n"
        "from diffusion_rl.reports.metrics import MetricsWriter\n"
        "wandb = {'entity': 'me', 'project': 'p', 'run': 'r', 'mode': 'disabled'}\n"
        f"m = MetricsWriter({str(tmp_path)!r}, tensorboard=False, wandb=wandb)\n"
        "m.write({'itr': 0}); m.close()\n"
        "print([name for name in ('wandb', 'tensorflow', 'matplotlib', 'torch') if name in sys.modules])\n"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("settings", "on"),
    [
        (None, False),
        ({}, False),
        ({"mode": "online"}, True),
        ({"entity": "me", "project": "p", "run": "r"}, True),
        ({"entity": "me", "project": "p", "run": "r", "mode": "disabled"}, False),
        ({"entity": None, "project": "p", "run": "r", "mode": "offline"}, True),
    ],
)
def test_when_wandb_is_on(settings, on):
    assert wandb_is_on(settings) is on


def test_wandb_gets_the_reference_keys_and_a_resumed_run_keeps_its_identity(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, row, step):
            calls.append(("log", row, step))

        def finish(self):
            calls.append(("finish",))

    class FakeWandb:
        @staticmethod
        def init(**kwargs):
            calls.append(("init", kwargs))
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb)
    settings = {"entity": "me", "project": "gym-hopper", "run": "first", "mode": "offline"}
    for itr in range(2):
        with writer(tmp_path, wandb=settings, config={"seed": 42}) as metrics:
            metrics.write({"itr": itr, "kind": "train", "loss": 0.5, "gone": None})
    starts = [call[1] for call in calls if call[0] == "init"]
    assert starts[0] == starts[1]
    assert {key: starts[0][key] for key in ("entity", "project", "name", "mode", "config", "resume")} == {
        "entity": "me",
        "project": "gym-hopper",
        "name": "first",
        "mode": "offline",
        "config": {"seed": 42},
        "resume": "allow",
    }
    assert [call[1:] for call in calls if call[0] == "log"] == [({"train/loss": 0.5}, 0), ({"train/loss": 0.5}, 1)]


def test_wandb_that_is_missing_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[wandb\]'"):
        writer(tmp_path, wandb={"entity": "me"})


def test_progress_away_from_a_terminal_is_a_few_plain_lines(capsys):
    stream = io.StringIO()
    with Progress(total=1000, label="fine-tuning", unit="iteration", units=10, stream=stream) as progress:
        for k in range(1000):
            progress.update(turn=k % 10 == 9)
    lines = stream.getvalue().splitlines()
    assert lines == ["fine-tuning, iteration 100 of 100: 100%, 0 s elapsed"]


def test_progress_is_sparse_however_long_the_run_and_estimates_nothing_from_what_compiles(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with Progress(total=36000, label="pre-training", stream=stream) as progress:
        progress.doing("compiling")
        clock[0] += 1000.0
        progress.doing()
        for _ in range(36000):
            clock[0] += 1.0
            progress.update()
    lines = stream.getvalue().splitlines()
    assert 10 <= len(lines) <= 150
    assert lines[0] == "pre-training, compiling: 0%, 0 s elapsed" and "left" not in lines[1]
    assert re.fullmatch(r"pre-training: 0%, 17:3\d elapsed, about 9:59:\d\d left", lines[2]), lines[2]


def test_rows_stand_below_their_headings(capsys):
    with Progress(total=2, label="demo", stream=io.StringIO()) as progress:
        progress.row({"itr": 0, "kind": "eval", "return": 1432.123, "seconds": 1.0})
        progress.row({"itr": 1, "kind": "train", "return": None, "seconds": 12.34, "loss": -0.00123})
        progress.row({"itr": 2, "kind": "eval", "return": 1500, "seconds": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        "   itr     kind   return  seconds",
        "     0     eval   1432.1        1",
        "   itr     kind   return  seconds     loss",
        "     1    train        -     12.3 -0.00123",
        "     2     eval     1500        1        -",
    ]


def test_columns_of_a_row_never_touch(capsys):
    numbers = [-0.000123456, -8.7654e-06, -123456.7, 1e-300, float("nan"), -0.5]
    with Progress(total=1, label="demo", stream=io.StringIO()) as progress:
        progress.row({"itr": 12345, **{f"v{i}": number for i, number in enumerate(numbers)}})
    assert len(capsys.readouterr().out.splitlines()[1].split()) == 1 + len(numbers)


@pytest.mark.parametrize("columns", [80, 120])
def test_progress_on_a_terminal_fits_its_width(columns, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    monkeypatch.setattr("tqdm.utils._environ_cols_wrapper", lambda: lambda file: columns)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 30))
    with Progress(total=4, label="fine-tuning", unit="iteration", stream=stream) as progress:
        progress.doing("compiling the update")
        for _ in range(4):
            progress.update()
        progress.note("a line")
    shown = stream.getvalue()
    assert "fine-tuning, iteration 1 of 4, compiling the update" in shown
    assert max(map(len, re.split(r"[\r\n]", shown.replace("\x1b[A", "")))) <= columns
    assert "a line" in capsys.readouterr().out


def test_duration():
    assert [duration(value) for value in (3.4, 75, 3723)] == ["3 s", "1:15", "1:02:03"]
