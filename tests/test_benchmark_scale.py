"""How cost grows and what a GPU does are measured by scripts: their numbers, and that they run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import scale  # noqa: E402
import scale_rows  # noqa: E402


def test_the_exponent_is_that_of_the_upper_half():
    sizes = [8, 16, 32, 64, 128]
    assert scale.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert scale.exponent(sizes, [5.0, 5.0, *(n**2 for n in sizes[2:])]) == pytest.approx(2)  # a floor at first
    assert scale.exponent(sizes[::-1], [7.0] * 5) == pytest.approx(0, abs=1e-12)
    assert scale.exponent([1, 10, 100], [9.0, 10.0, 100.0]) == pytest.approx(1)  # of three sizes the last two
    assert scale.exponent([8], [1.0]) is None and scale.exponent([8, 16], [1.0, 0.0]) is None


def test_memory_of_the_next_size_follows_a_line():
    assert scale.expected([], 10) == 0 and scale.expected([(10, 0.5)], 100) == 0.5
    assert scale.expected([(10, 1.0), (100, 1.9)], 1000) == pytest.approx(10.9)
    assert scale.expected([(10, 1.0), (100, 0.9)], 1000) == pytest.approx(0.9)


def test_a_size_that_does_not_fit_is_left_out_with_a_line(tmp_path, monkeypatch, capsys):
    def answer(process, parts, size, folder, seconds):
        part = {"build": 1.0, "first": 1.0, "call": size * 1e-3, "peak_gb": 1 + size * 1e-6}
        return {"start_gb": 1.0, "parts": dict.fromkeys(parts, part)}

    monkeypatch.setattr(scale, "_ask", answer)
    monkeypatch.setattr(scale.machine, "available_memory", lambda: 8.0)
    points = list(scale.measure("data", {"data": scale.ROWS["data"]}, quick=False))
    assert [point.size for point in points] == [10**4, 10**5, 10**6]
    assert "data, 10000000: left out, it needs about 10.0 GB of memory" in capsys.readouterr().err


def test_synthetic_data_are_whole(tmp_path):
    from diffusion_rl.data.sequences import SequenceDataset

    data = SequenceDataset(scale_rows.write_data(tmp_path / "train.npz", 2500), horizon_steps=4)
    assert data.states.shape == (2500, 11) and data.traj_lengths.tolist() == [1000, 1000, 500]


def test_two_sizes_are_measured_drawn_and_put_into_a_page(tmp_path):
    page, output = tmp_path / "page.md", tmp_path / "scale.png"
    page.write_text("before\n<!-- table:scale -->\n<!-- end:scale -->\nafter\n")
    command = [sys.executable, str(ROOT / "benchmarks/scale.py"), "--quick", "--rows", "simulation"]
    subprocess.run([*command, "--output", output, "--readme", page], check=True, timeout=600)
    assert "| environments: 8 / 40 | a chunk step simulated | " in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    points = [*scale._earlier(output).values()]
    assert [(point.row, point.size) for point in points] == [("simulation", 8), ("simulation", 40)]
    assert 0 < points[0].seconds < points[1].seconds and points[0].peak_gb > points[0].start_gb > 0.2
    assert output.is_file() and " machine" in output.with_suffix(".txt").read_text()
    assert scale._told(output) in page.read_text()  # which --draw writes again


def test_the_gpu_script_is_bash():
    subprocess.run(["bash", "-n", ROOT / "benchmarks/gpu.sh"], check=True)
    refused = subprocess.run(["bash", ROOT / "benchmarks/gpu.sh", "--no"], capture_output=True, text=True)
    assert refused.returncode == 2 and "usage: " in refused.stderr


def test_the_gpu_report_puts_steps_beside_each_other(tmp_path):
    row = {"seconds": 0.002, "first": 3.0, "peak_gb": 1.5}
    recorded = {"deviation": 1e-7, "gate": 1e-5, "failed": ""}
    found = {
        "about": {"device": "a GPU", "packages": {"torch": "2"}, "memory_growth": True},
        "parity_float32": {"recordings": {"net": recorded}, "exact": {"plans": 2e-6}},
        "parity_float32_tf32": {"recordings": {"net": recorded | {"deviation": 3e-4, "failed": "Mismatch"}}},
        "rows_float32": {"rows": {"sampling": row, "minibatch": {"failed": "ValueError: no"}}},
        "twins_float32": {"missing": "no PyTorch here"},
    }
    text = gpu.markdown(found, tmp_path)
    assert "a GPU; torch 2; memory grows on demand" in text
    assert "| net | 1.0e-07 | 1.0e-05 | 3.0e-04 |" in text and "| 2.0e-06 | | – |" in text
    assert "| sampling | 2 (3.0; 1.50) |" in text and "| minibatch | ValueError: no |" in text
    assert "Not measured: no PyTorch here." in text
    assert gpu.deviation(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_processor(tmp_path):
    environment = {"PYTHON": sys.executable, "OUT": str(tmp_path), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh", "--cpu"], env=environment, capture_output=True, text=True, timeout=3600
    )
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    recorded = results["parity_float32"]["recordings"]
    assert recorded and not any(each["failed"] for each in recorded.values())
    assert max(results["parity_float32"]["exact"].values()) < 1e-4
    for step in ("rows_float32", "rows_bfloat16", "twins_float32"):
        assert not any("failed" in row for row in results[step]["rows"].values())
