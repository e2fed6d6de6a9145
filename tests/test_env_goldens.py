"""Our environment layer against recordings of the reference's: `pytest tests/test_env_goldens.py --golden-dir DIR`.

Every recording is replayed through the wrappers for single environments and the vector environments, and those with
plain observations once more through the vectorised bookkeeping of the batched engine. What is left out is named in
`OUT_OF_SCOPE` (whole cases) and `DROPPED_CALLS` (single calls), with the reason; anything else has to agree, in the
values and the moment of every reset. Values are compared exactly, in the recorded dtype.
"""

from __future__ import annotations

import fnmatch
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from env_goldens import Raised, Recording, Scripted, build  # noqa: E402
from tests.sync_env import SyncVectorEnv  # noqa: E402

from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.envs.chunks import ChunkHistory, StepOutcomes  # noqa: E402
from diffusion_rl.envs.multi_step import REWARD_AGGREGATES, MultiStep  # noqa: E402
from diffusion_rl.envs.vector import ProcessVectorEnv  # noqa: E402

SHIPPED = Path(__file__).parent.parent / "parity_tests" / "goldens_env"

OUT_OF_SCOPE = {
    "env_robo*_init_*": "initial states: tests/test_robomimic.py",
    "env_furniture_*": "furniture environments: tests/test_furniture.py",
    "env_roboimg_bad_key": "error path of the reference's image wrapper; a configuration error here",
    "env_roboimg_no_*": "error paths of the reference's image wrapper without cameras or without state",
    "env_make_async_gym_render": "crash of the reference: float64 observations written to float32 shared memory",
    "env_ms_info_ragged": "crash of the reference: infos that change shape; here they become object arrays",
    "env_ms_prev_action_false": "crash of the reference; there is no previous-action history here",
    "env_ms_reset_kwargs": "how arguments of reset travel through gym's old interface",
    "env_vec_*_api": "call, get_attr, set_attr, render, asynchronous halves of gym's old vector interface",
    "env_vec_*_return_info": "gym's old return_info argument, with which the reference's worker fails",
    "env_vec_async_error_reset*": "the reference swallows these worker errors; tests/test_vector_env.py has ours",
}

DROPPED_CALLS = {
    "spaces": "gym spaces; ours is obs_spec, from the observations' shapes",
    "seed": "the reference seeds numpy's global generator, which no scripted environment reads",
    "render": "pictures of the scripted environment",
    "close": "nothing to compare",
    "get_prev_action": "history of actions: no algorithm reads it",
    "base.raw_after": "whether the wrapper changed the raw observation in place",
    "hold": "aliasing of returned arrays; ours are never reused",
    "held": "aliasing of returned arrays; ours are never reused",
    "step!": "raised by the script; has to raise here too",
}
COUNTER = "cnt"  # the only attribute whose recorded values matter


def reason_out_of_scope(name: str) -> str | None:
    return next((reason for pattern, reason in OUT_OF_SCOPE.items() if fnmatch.fnmatch(name, pattern)), None)


def golden_files(config: pytest.Config) -> list[Path]:
    folder = Path(config.getoption("--golden-dir") or SHIPPED)
    return sorted(folder.glob("env_*.npz"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" not in metafunc.fixturenames:
        return
    files = golden_files(metafunc.config)
    if metafunc.function is test_batched_bookkeeping:
        files = [path for path in files if reason_out_of_scope(path.stem) is None and is_batchable(path)]
    metafunc.parametrize("path", files, ids=[path.stem for path in files])


def assert_same(ours: Any, recorded: Any, where: str) -> None:
    """Equal values, ours in the recorded dtype."""
    if isinstance(recorded, dict):
        assert isinstance(ours, dict) and set(recorded) == set(ours), f"{where}: keys {set(ours)} != {set(recorded)}"
        for key, value in recorded.items():
            assert_same(ours[key], value, f"{where}.{key}")
        return
    recorded = np.asarray(recorded)
    if recorded.dtype == object:
        assert [str(value) for value in ours] == [str(value) for value in recorded], where
        return
    ours = np.asarray(ours).astype(recorded.dtype)
    np.testing.assert_array_equal(ours, recorded, err_msg=where, strict=True)


def as_observations(recorded: Any) -> dict[str, np.ndarray]:
    """A recorded observation of any form as {key: array}."""
    if isinstance(recorded, list):
        recorded = {key: np.stack([one[key] for one in recorded]) for key in recorded[0]}
    return dict(recorded) if isinstance(recorded, dict) else {"state": recorded}


def compare_info(info: dict[str, Any], recorded: dict[str, Any], where: str) -> None:
    info = dict(info)
    executed = info.pop("executed_steps")
    full, recorded = info.pop("full_obs", None), dict(recorded)
    recorded_full = recorded.pop("full_obs", None)
    if recorded_full is not None:
        # after an early end the recorded frames begin with the one before the chunk, which we leave out
        recorded_full = {key: frames[-executed:] for key, frames in as_observations(recorded_full).items()}
        assert_same(full, recorded_full, f"{where}.full_obs")
    assert_same(info, recorded, where)


def is_raised(value: Any) -> bool:
    return isinstance(value, Raised)


def without_video(options: dict[str, Any] | None) -> dict[str, Any]:
    """Options of a reset; the scripted environments have no pictures to film."""
    return {key: value for key, value in (options or {}).items() if key != "video_path"}


# ---------------------------------------------------------------------------------------------------------------------


def test_every_recording_is_replayed_or_listed(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture) -> None:
    files = golden_files(request.config)
    folder = request.config.getoption("--golden-dir")
    if not files and folder and any(Path(folder).glob("*.npz")):
        pytest.skip(f"{folder} holds recordings of other things than environments")
    assert files, "no recordings found"
    listed = {path.stem: reason_out_of_scope(path.stem) for path in files}
    for path in files:
        if listed[path.stem] is None:
            assert Recording(path).meta["kind"] == "env", f"{path.stem}: neither replayed nor listed in OUT_OF_SCOPE"
    batched = sum(is_batchable(path) for path in files if listed[path.stem] is None)
    with capsys.disabled():
        left_out = {name: reason for name, reason in listed.items() if reason is not None}
        print(f"\nenvironment recordings: {len(files)} files, {len(files) - len(left_out)} replayed", end="")
        print(f" ({batched} of them through the batched bookkeeping too), {len(left_out)} out of scope")
        for name, reason in left_out.items():
            print(f"  out of scope: {name}: {reason}")


def test_replay(path: Path) -> None:
    if (reason := reason_out_of_scope(path.stem)) is not None:
        assert reason
        return
    recording = Recording(path)
    if recording.meta["vector"]:
        replay_vector(recording, SyncVectorEnv)
        if "async" in path.stem:
            replay_vector(recording, ProcessVectorEnv)
    else:
        replay_single(recording)


def replay_single(recording: Recording) -> None:
    env: Any = None
    for number, (op, args, kwargs, recorded) in enumerate(recording.calls):
        where = f"{recording.path.stem} call {number} ({op})"
        if op == "build":
            if is_raised(recorded) or has_unknown_aggregate(recording):
                with pytest.raises(UserError):
                    build(recording.path, 0)
                return
            env = build(recording.path, 0)
        elif op == "reset" and not is_raised(recorded):  # a raising one never reaches the environment
            if isinstance(env, MultiStep):
                observations = env.reset(options=without_video(kwargs.get("options")))
            else:
                observations, _ = env.reset()
            assert_same(observations, as_observations(recorded), where)
        elif op == "step" and is_raised(recorded):
            with pytest.raises(ValueError):
                env.step(*args)
        elif op == "step":
            compare_step(env.step(*args), recorded, where, isinstance(env, MultiStep))
        elif op in ("normalize_obs", "unnormalize_action", "unnormaliza_action"):
            method = env.normalizer.normalize_obs if op == "normalize_obs" else env.normalizer.unnormalize_action
            assert_same(method(*args), recorded, where)
        elif op == "getattr" and args[0] == COUNTER:
            assert env.count == recorded, where
        else:
            assert op in DROPPED_CALLS or op == "reset", f"{where}: neither replayed nor listed in DROPPED_CALLS"
    compare_actions(env, recording, 0)


def has_unknown_aggregate(recording: Recording) -> bool:
    """A way to sum up rewards that does not exist: ours refuses at once, the reference at every step."""
    return any(kwargs.get("reward_agg_method", "sum") not in REWARD_AGGREGATES for _, kwargs in recording.stack)


def compare_step(result: tuple, recorded: tuple, where: str, chunked: bool) -> None:
    observations, reward, terminated, truncated, info = result
    assert_same(observations, as_observations(recorded[0]), f"{where} observations")
    assert_same(reward, recorded[1], f"{where} reward")
    assert_same(terminated, recorded[2], f"{where} terminated")
    if chunked:
        assert_same(truncated, recorded[3], f"{where} truncated")
        compare_info(info, recorded[4], f"{where} info")


def compare_actions(env: Any, recording: Recording, index: int) -> None:
    """The scripted environment received the actions that the recorded one received."""
    while not isinstance(env, Scripted):
        env = env.env
    recorded = recording.actions_received(index)
    assert len(env.actions) == len(recorded)
    for step, (ours, theirs) in enumerate(zip(env.actions, recorded, strict=True)):
        assert_same(ours, theirs, f"{recording.path.stem} action {step} of environment {index}")


def replay_vector(recording: Recording, kind: type) -> None:
    chunk = dict(recording.stack)["MultiStep"].get("n_action_steps", 1)
    venv = kind([partial(build, recording.path, i) for i in range(recording.n_envs)], chunk)
    try:
        for number, (op, args, kwargs, recorded) in enumerate(recording.calls):
            where = f"{recording.path.stem} call {number} ({op}, {kind.__name__})"
            if op == "step" and is_raised(recorded):
                with pytest.raises((UserError, ValueError)):
                    venv.step(np.stack(args[0]))
                return
            if op == "reset" and is_raised(recorded):
                return
            if op == "step":
                compare_vector_step(venv.step(np.stack(args[0])), recorded, where)
            elif op == "reset_arg" and not is_raised(recorded):
                assert_same(
                    venv.reset([without_video(one) for one in kwargs["options_list"]]), as_observations(recorded), where
                )
            elif op == "reset":
                assert_same(venv.reset(), as_observations(recorded), where)
            else:
                assert op in DROPPED_CALLS or op in ("build", "getattr") or is_raised(recorded), where
    finally:
        venv.close()


def compare_vector_step(result: Any, recorded: tuple, where: str) -> None:
    assert_same(result.observations, as_observations(recorded[0]), f"{where} observations")
    assert_same(result.rewards, recorded[1], f"{where} rewards")
    assert_same(result.terminated, recorded[2], f"{where} terminated")
    assert_same(result.truncated, recorded[3], f"{where} truncated")
    compare_final(result.infos, result.truncated, recorded[4], where)


def compare_final(infos: dict[str, Any], truncated: np.ndarray, recorded: Any, where: str) -> None:
    """final_observations against the recorded infos' final_obs; `truncated` says where they are valid."""
    for row, info in enumerate(recorded):
        if "final_obs" in info:
            assert truncated[row], where
            final = {key: value[row] for key, value in infos["final_observations"].items()}
            assert_same(final, as_observations(info["final_obs"]), f"{where} final observations of {row}")


# ------------------------------------------------------------------------------------ the batched engine's bookkeeping


def is_batchable(path: Path) -> bool:
    """One plain observation vector, rewards summed: what the batched engine handles."""
    recording = Recording(path)
    if recording.meta["kind"] != "env" or not recording.stack or recording.stack[-1][0] != "MultiStep":
        return False
    classes = [name for name, _ in recording.stack]
    plain = all(plain_space(env.get("observation_space")) for env in recording.meta["envs"])
    summed = recording.stack[-1][1].get("reward_agg_method", "sum") == "sum"
    fails = any("raise_at" in env for env in recording.meta["envs"])
    return plain and summed and not fails and set(classes) <= {"MujocoLocomotionLowdimWrapper", "MultiStep"}


def plain_space(space: dict[str, Any] | None) -> bool:
    if space is None or space["type"] == "discrete":
        return False
    return space["type"] == "box" or list(space["spaces"]) == ["state"]


class ScriptedEngine:
    """The batched engine's bookkeeping over scripted dynamics instead of MuJoCo."""

    def __init__(self, recording: Recording):
        normalized = recording.stack[0][0] != "MultiStep"
        options = recording.stack[-1][1]
        self.normalize = recording.normalizer.normalize_obs if normalized else (lambda observation: observation)
        self.envs = [Scripted(recording, i) for i in range(recording.n_envs)]
        self.reset_within_step = options.get("reset_within_step", False)
        for env in self.envs:
            env.k += normalized  # the recorded wrapper's constructor reset once
        size = self._vector(self.envs[0]._row("reset_obs", 0)).shape[0]
        self.history = ChunkHistory(
            len(self.envs), options.get("n_obs_steps", 1), size, options.get("max_episode_steps")
        )

    def _vector(self, observation: Any) -> np.ndarray:
        return self.normalize(observation["state"] if isinstance(observation, dict) else observation)

    def reset(self, rows: Any = None) -> np.ndarray:
        rows = np.arange(len(self.envs)) if rows is None else rows
        self.history.start(rows, np.stack([self._vector(self.envs[row].reset()[0]) for row in rows]))
        return self.history.frames.copy()

    def step(self, actions: np.ndarray) -> Any:
        chunk = actions.shape[1]
        outcome = self.history.advance(np.arange(len(self.envs)), self._peek(chunk))
        for env, executed in zip(self.envs, outcome.executed, strict=True):
            env.t += int(executed)
            env.elapsed += int(executed)
        observations = outcome.observations
        ended = np.flatnonzero(outcome.terminated | outcome.truncated)
        if self.reset_within_step and len(ended):
            observations = self.reset(ended)
        return outcome, observations

    def _peek(self, chunk: int) -> StepOutcomes:
        """Every step of the chunk, also those after its end: the bookkeeping has to leave them out."""
        rows = [
            [env.peek(min(env.t + j, env.n_steps - 1), env.elapsed + j + 1) for j in range(chunk)] for env in self.envs
        ]
        limits = [[step[3].get("TimeLimit.truncated") for step in row] for row in rows]
        return StepOutcomes(
            observations=np.array([[self._vector(step[0]) for step in row] for row in rows]),
            rewards=np.array([[step[1] for step in row] for row in rows]),
            done=np.array([[step[2] for step in row] for row in rows], dtype=bool),
            limit_known=np.array([[limit is not None for limit in row] for row in limits]),
            limit_hit=np.array([[bool(limit) for limit in row] for row in limits]),
        )


def test_batched_bookkeeping(path: Path) -> None:
    recording = Recording(path)
    single = not recording.meta["vector"]
    engine = ScriptedEngine(recording)
    for number, (op, args, _, recorded) in enumerate(recording.calls):
        where = f"{recording.path.stem} call {number} ({op})"
        if is_raised(recorded):
            if op == "reset":
                return
            continue
        if op in ("reset", "reset_arg"):
            recorded = as_observations(recorded)["state"]
            assert_same(engine.reset(), recorded[None] if single else recorded, where)
        elif op == "step":
            actions = np.atleast_2d(args[0])[None] if single else np.stack(args[0])
            if single:
                recorded = tuple(np.asarray(value)[None] for value in flat(recorded)) + ((recorded[4],),)
            outcome, observations = engine.step(actions)
            assert_same(observations, as_observations(recorded[0])["state"], f"{where} observations")
            assert_same(outcome.rewards, recorded[1], f"{where} rewards")
            assert_same(outcome.terminated, recorded[2], f"{where} terminated")
            assert_same(outcome.truncated, recorded[3], f"{where} truncated")
            infos = {"final_observations": {"state": outcome.observations}}
            compare_final(infos, outcome.truncated, recorded[4], where)
            for row, info in enumerate(recorded[4]):
                if "full_obs" in info:
                    executed = outcome.executed[row]
                    frames = as_observations(info["full_obs"])["state"][-executed:]
                    assert_same(outcome.frames[row, :executed], frames, f"{where} full observations")
        elif op == "getattr" and args[0] == COUNTER and single:
            assert engine.history.count[0] == recorded, where


def flat(recorded: tuple) -> tuple:
    """observation array, reward, terminated, truncated of a single environment's recorded step."""
    return (as_observations(recorded[0])["state"], *recorded[1:4])
