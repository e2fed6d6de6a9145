"""The experiment runner: grids, YAML, variants on disk, children and their exit statuses, progress, interruptions."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tests import test_vae_diffusion

from diffusion_rl.cli import experiments, variants
from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.core.errors import UserError
from diffusion_rl.training.locks import child_lock

META = {"exp_name": "some", "script_path": "child.py"}

CHILD = """
import argparse, pathlib, sys, time, yaml
parser = argparse.ArgumentParser()
parser.add_argument("-e"); parser.add_argument("-g")
given = parser.parse_args()
variant = yaml.safe_load(open(given.e))
for i in range(1, 4):
    print(f"working: {i}/3", flush=True)
    time.sleep(variant.get("seconds", 0))
here = pathlib.Path("done"); here.mkdir(exist_ok=True)
(here / f"{variant['exp_id']}").write_text(given.g)
sys.exit(variant["status"])
"""


def grid(**spec):
    return experiments.variants({"meta_data": META, **spec})


def write_spec(folder, **spec):
    folder.mkdir(exist_ok=True)
    (folder / "child.py").write_text(CHILD)
    (folder / "spec.yaml").write_text(yaml.safe_dump({"meta_data": {**META, "num_workers": 2}, **spec}))


def heed_sigint():
    """A shell's background jobs ignore SIGINT, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder, *options):
    command = [sys.executable, str(REPOSITORY / "run_experiment.py"), "-e", "spec.yaml", *options]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed_sigint
    )


def finish(folder, *options):
    process = start(folder, *options)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


# ---------- the grid ----------


def test_every_combination_with_the_last_variable_fastest():
    found = grid(variables={"seed": [1, 2], "net": {"width": [8, 16, 32]}}, constants={"net": {"depth": 3}, "seed": 0})
    assert [(v["seed"], v["net"]["width"]) for v in found] == [(1, 8), (1, 16), (1, 32), (2, 8), (2, 16), (2, 32)]
    assert all(v["net"]["depth"] == 3 and v["exp_name"] == "some" for v in found)
    assert [v["exp_id"] for v in found] == list(range(6))
    found[0]["net"]["depth"] = 9
    assert found[1]["net"]["depth"] == 3, "variants share nothing"


GUIDES_GRID = {
    **{"seed": [100, 200, 300], "vae_latent_dim": [32, 64, 128], "online_training": [False, True]},
    "rl_learning_rate": [1e-4, 3e-4, 1e-3],
}


def test_the_guides_grid_has_54_runs_in_folders_of_their_own(monkeypatch):
    assert len(grid(variables=GUIDES_GRID, constants={})) == 54
    monkeypatch.chdir(REPOSITORY)
    where, _ = folders(spec_of("train.py", GUIDES_GRID, dataset="toy"), *GUIDES_GRID)
    assert len(set(where)) == 54


def test_the_example_is_the_guides():
    spec = experiments.read_spec(REPOSITORY / "exp_specs" / "vae_diffusion_rl_example.yaml")
    guide = {"diffusion": "models.DiffusionRL", "loader": "datasets.VAESequenceDataset", "vae_latent_dim": 64}
    guide |= {"trajectory_latent_dim": 128, "vae_weight": 1.0, "rl_learning_rate": 3e-4, "use_value_function": True}
    guide |= {"evaluator": "utils.MADEvaluator", "continue_training": True}
    assert spec["meta_data"]["script_path"] == "train.py" and spec["variables"] == {"online_training": [False, True]}
    assert {key: spec["constants"].get(key) for key in guide} == guide


@pytest.mark.parametrize("variables", [None, {}])
def test_without_variables_there_is_one_run(variables):
    constants = {"a": {"b": 1}}
    (found,) = grid(variables=variables, constants=constants)
    found["a"]["b"] = 2
    assert constants == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "a mapping"),
        ("a: 1\na: 2", "stands twice"),
        ("a.b: 1", "must be a text without a dot"),
        ("1: 2", "must be a text"),
        ("a: !!python/object/apply:os.system [echo]", "not valid YAML"),
    ],
)
def test_yaml_that_is_no_experiment_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        experiments.read_spec(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="No such file"):
        experiments.read_spec(tmp_path / "none.yaml")


def test_numbers_without_a_dot_are_numbers(tmp_path):
    (tmp_path / "x.yaml").write_text("a: [1e-4, 3e-4, 1E3, -2e+1, .5e1, 1.5, 7]\nb: [e5, 1e, 12-3, 2001-01-01x]")
    found = experiments.read_spec(tmp_path / "x.yaml")
    assert found["a"] == [1e-4, 3e-4, 1e3, -20.0, 5.0, 1.5, 7] and all(isinstance(x, str) for x in found["b"])
    assert all(isinstance(x, float) for x in found["a"][:6])


def test_mistakes_in_a_specification_are_named():
    for spec, message in (
        ({"variables": {"seed": 3}}, "variables: seed must be a list"),
        ({"variables": {"seed": []}}, "variables: seed must be a list"),
        ({"variables": {"a": {"b": [1]}}, "constants": {"a": 2}}, "a is a value among the constants"),
        ({"constant": {}}, "constant: an experiment has"),
    ):
        with pytest.raises(UserError, match=message):
            grid(**spec)
    with pytest.raises(UserError, match="needs script_path"):
        experiments.variants({"meta_data": {"exp_name": "x"}})


def test_shipped_specifications_expand():
    files = sorted((REPOSITORY / "exp_specs").glob("*.yaml"))
    assert len(files) >= 5
    for path in files:
        found = experiments.variants(experiments.read_spec(path))
        assert all((REPOSITORY / variant["script_path"]).is_file() for variant in found), path
        for variant in found if found[0]["script_path"] == "train.py" else ():
            variants.settings(variant)  # refuses what does not fit together


# ---------- how scripts are started ----------


def test_other_scripts_of_the_repository_get_their_own_arguments(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    hydra = {"config_name": "ft", "config_dir": "cfg/x", "train": {"n_train_itr": 2}, "wandb": None, "a": [1, 2]}
    given = experiments.command_of({**hydra, "script_path": "script/run.py", "exp_id": 0}, Path("0.yaml"), "1")
    assert given[2:] == ["--config-name=ft", "--config-dir=cfg/x", "train.n_train_itr=2", "wandb=null", "a=[1,2]"]
    flags = {"dataset": "hopper-medium-v2", "horizon": 16, "script_path": "scripts/train.py"}
    given = experiments.command_of(flags, Path("0.yaml"), "1")
    assert given[2:] == ["--dataset", "hopper-medium-v2", "--horizon", "16"]
    assert experiments.command_of({"script_path": "train.py"}, Path("0.yaml"), "1")[2:] == ["-e", "0.yaml", "-g", "1"]
    with pytest.raises(UserError, match="no such file"):
        experiments.command_of({"script_path": "nothing.py"}, Path("0.yaml"), "0")


# ---------- runs ----------


def test_runs_are_started_and_failures_counted_and_resumed(tmp_path):
    """In a folder whose name has a space."""
    folder = tmp_path / "a folder"
    write_spec(folder, variables={"status": [0, 3, 0]}, constants={"lr": 1e-4})
    status, output = finish(folder, "-g", "2")
    assert status == 1 and "2 of 3 runs done" in output and "run 1: FAILED (exit status 3): working: 3/3" in output
    assert sorted(p.name for p in (folder / "done").iterdir()) == ["0", "1", "2"]
    assert (folder / "done" / "0").read_text() == "2"
    (launch,) = (folder / "logs" / "variants" / "variants-for-some").iterdir()
    assert {p.name for p in launch.iterdir()} >= {"exp_spec_definition.yaml", "0.yaml", "1.yaml", "2.yaml", "1.log"}
    assert yaml.safe_load((launch / "1.yaml").read_text())["lr"] == 1e-4
    assert json.loads((launch / "status.json").read_text())["1"]["exit"] == 3
    for path in (folder / "done").iterdir():
        path.unlink()
    (folder / "child.py").write_text(CHILD.replace('variant["status"]', "0"))
    status, output = finish(folder, "--resume")
    assert status == 0 and "3 of 3 runs done" in output
    assert [p.name for p in (folder / "done").iterdir()] == ["1"], "those that were done are not run again"
    assert len(list((folder / "logs" / "variants" / "variants-for-some").iterdir())) == 1


@pytest.mark.slow
def test_the_guides_grid_is_finished_by_resuming(tmp_path):
    """Two seeds of three are done at first; the other 18 runs fail."""
    write_spec(tmp_path, variables=GUIDES_GRID)
    script = CHILD.replace('variant["status"]', "STATUS")
    (tmp_path / "child.py").write_text(script.replace("STATUS", 'variant["seed"] == 300'))
    status, output = finish(tmp_path)
    assert status == 1 and "36 of 54 runs done" in output
    for path in (tmp_path / "done").iterdir():
        path.unlink()
    (tmp_path / "child.py").write_text(script.replace("STATUS", "0"))
    status, output = finish(tmp_path, "--resume")
    assert status == 0 and "54 of 54 runs done" in output
    (launch,) = (tmp_path / "logs" / "variants" / "variants-for-some").iterdir()
    failed = [n for n in range(54) if yaml.safe_load((launch / f"{n}.yaml").read_text())["seed"] == 300]
    assert sorted(int(path.name) for path in (tmp_path / "done").iterdir()) == failed


@pytest.mark.slow
def test_some_of_the_guides_grid_train_and_leave_results(tmp_path):
    small = {**test_vae_diffusion.SMALL, "eval_freq": 12, "save_freq": 12, "num_eval": 2, "num_envs": 2}
    del small["vae_latent_dim"]
    variables = {"vae_latent_dim": [4, 6], "online_training": [False, True]}
    write_spec(tmp_path, variables=variables, constants={**small, "seed": 100, "continue_training": True})
    spec = yaml.safe_load((tmp_path / "spec.yaml").read_text())
    spec["meta_data"]["script_path"] = str(REPOSITORY / "train.py")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    status, output = finish(tmp_path)
    assert status == 0, output
    results = {path.parent.parent for path in (tmp_path / "logs" / "some").rglob("results/step_*.json")}
    assert len(results) == 4
    status, output = finish(tmp_path, "--resume")
    assert status == 0 and "4 of 4 runs done" in output


def test_interrupting_stops_the_children(tmp_path):
    write_spec(tmp_path, variables={"status": [0, 0, 0]}, constants={"seconds": 20})
    process = start(tmp_path)
    logs = tmp_path / "logs" / "variants" / "variants-for-some"
    until = time.monotonic() + 40
    while not [p for p in logs.glob("*/*.log") if p.stat().st_size] and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 130 and "--resume goes on" in output
    children = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(logs.relative_to(tmp_path)) not in children or not (tmp_path / "done").exists()


def test_a_killed_runner_takes_its_children_with_it(tmp_path):
    """So that --resume does not start the same runs beside them."""
    write_spec(tmp_path, variables={"status": [0, 0]}, constants={"seconds": 1})
    process, logs = start(tmp_path), tmp_path / "logs" / "variants" / "variants-for-some"
    until = time.monotonic() + 40
    while len([p for p in logs.glob("*/*.log") if p.stat().st_size]) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    status, output = finish(tmp_path, "--resume")
    assert status == 0 and "2 of 2 runs done" in output
    assert all(path.read_text().count("working: 3/3") == 1 for path in logs.glob("*/*.log"))


def test_a_process_of_an_earlier_launch_is_waited_for(tmp_path):
    job = experiments.Job(tmp_path / "0.yaml", [sys.executable, "-c", "pass"])
    lock = child_lock(tmp_path / "0.lock")
    pool = experiments.Pool(tmp_path, [job], 1, "0", io.StringIO())
    waiting, running = [job], []
    pool._start(waiting, running)
    assert (waiting, running) == ([job], []) and "still runs; waiting" in pool.stream.getvalue()
    lock.close()
    assert pool.run(poll_seconds=0.05) == 0


# ---------- folders ----------


def folders(spec, *varied):
    found = experiments.tell_apart(experiments.variants(spec), varied)
    return [variants.folder_of(variant, experiments.style_of(variant)) for variant in found], found


def spec_of(script, variables, **constants):
    meta = {"exp_name": "some", "script_path": str(REPOSITORY / script)}
    return {"meta_data": meta, "variables": variables, "constants": constants}


def test_runs_that_would_share_a_folder_get_names_of_their_own(monkeypatch):
    vae = {"dataset": "toy", "horizon": 2, "history_horizon": 2}
    where, found = folders(spec_of("train.py", {"seed": [1, 2], "online_training": [False, True]}, **vae))
    assert len(set(where)) == 4 and not any("job_name" in variant for variant in found), "as it always was"
    where, _ = folders(spec_of("train.py", {"seed": [1], "batch_size": [8, 16]}, **vae), "seed", "batch_size")
    assert [each.rpartition("online_False-")[2] for each in where] == ["batch_size_8/1", "batch_size_16/1"]
    where, _ = folders(spec_of("scripts/train.py", {"learning_rate": [1e-3, 1e-4]}, resume="True"), "learning_rate")
    assert [each.rpartition("/")[2] for each in where] == [
        "defaults-learning_rate_0.001_H32_T20",
        "defaults-learning_rate_0.0001_H32_T20",
    ]
    where, _ = folders(spec_of("scripts/train.py", {"horizon": [8, 16]}), "horizon")
    assert [each.rpartition("/")[2] for each in where] == ["defaults_H8_T20", "defaults_H16_T20"]
    hydra = {"config_name": "ft_ppo_diffusion_mlp", "config_dir": str(REPOSITORY / "cfg/gym/finetune/hopper-v2")}
    where, found = folders(spec_of("script/run.py", {"train": {"gamma": [0.9, 0.99]}}, **hydra), "train.gamma")
    assert len(set(where)) == 2 and [v["name"].rpartition("-")[2] for v in found] == [
        "train.gamma_0.9",
        "train.gamma_0.99",
    ]
    assert "name" not in folders(spec_of("script/run.py", {"seed": [1, 2]}, **hydra), "seed")[1][0]


def test_runs_that_are_the_same_are_refused():
    with pytest.raises(UserError, match="runs 0, 1 would all write to .*: they do not differ in seed"):
        folders(spec_of("train.py", {"seed": [1, 1]}, dataset="toy"), "seed")


def test_a_variant_that_is_another_now_is_not_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "child.py").write_text("")
    (tmp_path / "status.json").write_text('{"0": {"exit": 0}, "1": {"exit": 0}}')
    found = grid(variables={"a": [1, 2]})
    for variant in found:
        experiments.write_yaml(tmp_path / f"{variant['exp_id']}.yaml", variant)
    found[1]["a"] = 3
    assert [job.status for job in experiments._jobs(tmp_path, found, "0")] == [0, None]


def test_progress_tells_how_long_it_will_take(tmp_path):
    jobs = [experiments.Job(tmp_path / f"{i}.yaml", []) for i in range(4)]
    jobs[0].status = 0
    jobs[1].log.write_text("training: 10/100, 3 s elapsed\ntraining: 50/100, 12 s elapsed, about 12 s left\n")
    pool = experiments.Pool(tmp_path, jobs, 2, "0", io.StringIO())
    pool.skipped, pool.began = 0, time.monotonic() - 60
    text = pool.progress([jobs[1]])
    assert text.startswith("1/4 done, 1:00 elapsed, about 1:40 left | 1: training: 50/100")


def test_two_launches_in_the_same_second_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda text: "variants-2026_01_01_00_00_00")
    assert experiments._new_folder(tmp_path) != experiments._new_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["variants-2026_01_01_00_00_00", "variants-2026_01_01_00_00_00-1"]


@pytest.mark.parametrize("place", [pytest.param("ray", marks=pytest.mark.slow), "local"])
def test_runs_elsewhere_end_with_their_statuses_and_logs(place, tmp_path):
    pytest.importorskip({"ray": "ray", "local": "submitit"}[place])
    write_spec(tmp_path, variables={"status": [0, 3]})
    process = start(tmp_path, "--on", place)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "run 1: FAILED (exit status 3): working: 3/3" in output and "1 of 2 runs done" in output
    assert sorted(path.name for path in (tmp_path / "done").iterdir()) == ["0", "1"]
