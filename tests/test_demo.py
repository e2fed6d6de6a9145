"""The demonstration's own logic, with the loops replaced by what they leave in their folders."""

import numpy as np
import pytest
from omegaconf import OmegaConf

from diffusion_rl.cli import demo
from diffusion_rl.core.errors import UserError
from diffusion_rl.reports.metrics import MetricsWriter
from diffusion_rl.training.checkpoint import save_checkpoint


@pytest.fixture
def loops(tmp_path, monkeypatch):
    """Runs that would have been started: (configuration, overrides). They leave metrics and a checkpoint behind."""
    monkeypatch.chdir(tmp_path)
    started = []

    def run(config):
        name, overrides = config.name, list(config.overrides)
        started.append((name, overrides))
        folder = tmp_path / next(o for o in overrides if o.startswith("logdir=")).removeprefix("logdir=")
        tuned = any(o.startswith("base_policy_path=") for o in overrides)
        with MetricsWriter(folder, tensorboard=False) as metrics:
            if "eval" in name:
                row = {"itr": 0, "kind": "eval", "episode_return": 2800.0 if tuned else 1400.0, "episodes": 40}
                metrics.write(row)
            else:
                for itr, kind in enumerate(("eval", "train", "eval")):
                    row = {"itr": itr, "kind": kind, "env_steps": itr * 80000, "episode_return": 1400.0 + itr}
                    metrics.write(row)
                (folder / "checkpoint").mkdir()
                save_checkpoint(folder / "checkpoint" / "state_2.safetensors", {"model.a": np.zeros(3)}, {"itr": 2})

    def compose(name, overrides):
        return OmegaConf.create({"name": name, "overrides": overrides, "hydra": {}})

    monkeypatch.setattr(demo, "compose", compose)
    monkeypatch.setattr(demo.app, "run", run)
    monkeypatch.setattr(demo.app, "prepare", lambda config: config)
    return started


def test_it_evaluates_both_policies_on_the_same_seeds_and_shows_the_ratio(loops, tmp_path, capsys):
    assert demo.main(["train.n_steps=100"]) == 0
    names = [name for name, _ in loops]
    assert names == [demo.EVALUATE, demo.FINE_TUNE, demo.EVALUATE]
    before, tuning, after = (overrides for _, overrides in loops)
    assert "train.n_steps=100" in tuning and f"train.n_train_itr={demo.ITERATIONS}" in tuning
    assert set(demo.EVALUATE_OVERRIDES) <= set(before) & set(after)
    (policy,) = [o for o in after if o.startswith("base_policy_path=")]
    assert policy.endswith("fine-tuning/checkpoint/state_2.safetensors")
    out = capsys.readouterr().out
    assert "before fine-tuning    1400.0         40" in out and "after fine-tuning     2800.0         40" in out
    assert "after / before          2.00" in out
    assert out.count("learning curve so far: ") == 1
    (figure,) = [line.split()[-1] for line in out.splitlines() if line.startswith("learning curve")]
    assert (tmp_path / figure).stat().st_size > 10_000 and (tmp_path / figure).with_suffix(".csv").exists()


def test_a_quick_one_cuts_episodes_short_and_says_so(loops, capsys):
    assert demo.main(["train.n_steps=100"], quick=True) == 0
    before, tuning, after = (overrides for _, overrides in loops)
    assert set(demo.QUICK_EVALUATE) <= set(before) & set(after) and set(demo.QUICK_FINE_TUNE) <= set(tuning)
    assert tuning.index("train.n_steps=25") < tuning.index("train.n_steps=100"), "the last one counts"
    assert "episodes were cut short" in capsys.readouterr().out


def test_an_evaluation_without_an_episode_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "compose", lambda name, overrides: OmegaConf.create({}))
    monkeypatch.setattr(demo.app, "run", lambda config: MetricsWriter(tmp_path, tensorboard=False).close())
    with pytest.raises(UserError, match="finished no episode"):
        demo.evaluate(tmp_path)


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        demo.checkpoint_of(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"), [("--nope", "cannot read the argument"), ("train.n_steps=0", "train.n_steps=0")]
)
def test_an_override_that_cannot_work_is_said_before_anything_runs(override, message, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda *arguments: pytest.fail("a run was started"))
    with pytest.raises(UserError, match=message):
        demo.main([override])
