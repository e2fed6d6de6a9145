"""What algorithms say of themselves is read from their source, and is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_rl.config.declared import declared, declaring, is_declared
from diffusion_rl.config.instantiate import find_class
from diffusion_rl.config.keys import KEYS
from diffusion_rl.config.reads import LOOPS, _of, algorithm_keys, is_own

METHODS = "diffusion_rl.methods"
OFF_POLICY = declaring(f"{METHODS}.off_policy", "KIND")
ON_POLICY = declaring(f"{METHODS}.on_policy", "KIND")


def test_bases_count_as_in_python():
    assert declared(f"{METHODS}.off_policy.rwr.RWR", "TRAIN_KEYS").startswith("lr ")  # of a class of the same module
    assert declared(f"{METHODS}.off_policy.sac.SoftActorCritic", "KIND") == "gaussian_policy"  # of another one's
    assert declared(f"{METHODS}.off_policy.rwr.GaussianRWR", "LABEL", "none") == "none"
    assert declared(f"{METHODS}.on_policy.ppo.ClippedPPO", "KIND") is None
    assert is_declared("diffusion_rl.networks.mlp.DiffusionMLP") and not is_declared("diffusion_rl.networks.mlp.tf")


@pytest.mark.parametrize("path", [*OFF_POLICY, *ON_POLICY])
@pytest.mark.parametrize("attribute", ["KIND", "LABEL", "TRAIN_KEYS", "EXPORTABLE", "ACTS_WITH"])
def test_what_is_read_is_what_the_class_has(path, attribute):
    assert declared(path, attribute) == getattr(find_class(path), attribute, None)


@pytest.mark.parametrize("path", OFF_POLICY)
def test_declared_keys_are_known_and_all_that_the_module_reads(path):
    words = declared(path, "TRAIN_KEYS")
    for word in words.split():
        assert word in ("actor", "critic") or any(key.startswith(f"train.{word}") for key in KEYS), word
    module = path.rpartition(".")[0]
    source = Path(find_class(path).__module__.replace(".", "/")).with_suffix(".py")
    text = (Path(__file__).parents[1] / "code" / source).read_text()
    read = set(re.findall(r'settings(?:\.get\(|\[)"(\w+)"', text)) - {"actor_steps"}  # of the reference's recordings
    unsaid = {key for key in read if not _of(key, f"{LOOPS['OffPolicyTraining']} {words}")}
    assert not unsaid, f"{module} reads these keys of train, which TRAIN_KEYS does not name"


@pytest.mark.parametrize("target", ["", "os.path.PurePath", "no_such_package.A", "tests.no_such.A", f"{METHODS}.no.A"])
def test_what_is_not_there_says_nothing(target):
    assert declared(target, "KIND", "nothing") == "nothing" and not is_declared(target)


def test_a_class_of_ones_own_may_say_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_silent.py").write_text(
        "raise RuntimeError('imported')\nclass A: pass\nclass B: TRAIN_KEYS = 'x'\n"
    )
    assert algorithm_keys({"model": {"_target_": "own_silent.A"}}) is None
    assert is_own("train.x", {"model": {"_target_": "own_silent.B"}})
    assert not is_own("train.y", {"model": {"_target_": "own_silent.B"}})


def test_tensorflow_is_not_imported():
    code = (
        "import sys; from diffusion_rl.config.declared import declaring; from diffusion_rl.reports import runs; "
        f"assert len(declaring({METHODS + '.off_policy'!r}, 'TRAIN_KEYS')) == {len(OFF_POLICY) - 3}; "
        "assert runs.class_labels()['RWR'] == 'DRWR'; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
