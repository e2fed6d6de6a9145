"""One golden file in, passed (returns), failed (raises `Mismatch`) or not implemented (raises `NotImplementedCase`)."""

from __future__ import annotations

from pathlib import Path

from parity_tests.not_implemented import reason_for
from parity_tests.replay import (
    agents,
    build,
    case,
    custom,
    decisions,
    diffuser,
    diffuser_lite_pipelines,
    diffuser_lite_runs,
    diffuser_runs,
    dsrl_runs,
    flow_q_runs,
    flow_runs,
    fpo_plus_runs,
)
from parity_tests.replay.files import Golden

OF_FLOWS = flow_q_runs.RUNNERS | dsrl_runs.RUNNERS | fpo_plus_runs.RUNNERS


class NotImplementedCase(Exception):
    """The case is listed in parity_tests/not_implemented.py."""


def replay(path: str | Path) -> None:
    """Replay one file of whatever kind.

    Raises:
        NotImplementedCase: listed as not covered, with the name of what is missing.
        Mismatch: an array differs.
        NotCovered: the file is neither covered nor listed.
    """
    golden = Golden.load(path)
    classes = golden.classes()
    reason = reason_for(golden.name, classes)
    if reason:
        raise NotImplementedCase(reason)
    if golden.kind == "upstream_error":
        check = decisions.decision(golden.name, golden.meta["error"])
        if check is None:
            error = golden.meta["error"]
            raise case.NotCovered(f"{golden.name}: no decision in parity_tests/replay/decisions.py for: {error}")
        check()
        return
    if golden.kind == "schedules":
        custom.schedules(golden)
        return
    if golden.meta.get("runner") in diffuser_runs.RUNNERS:
        diffuser_runs.replay(golden)
        return
    if golden.meta.get("runner") == "lite_pipeline":
        diffuser_lite_pipelines.replay(golden)
        return
    if golden.meta.get("runner") in diffuser_lite_runs.RUNNERS:
        diffuser_lite_runs.RUNNERS[golden.meta["runner"]](golden)
        return
    if golden.meta.get("runner") in OF_FLOWS:
        OF_FLOWS[golden.meta["runner"]](golden)
        return
    if golden.meta.get("custom_type") in flow_runs.RUNNERS:
        flow_runs.RUNNERS[golden.meta["custom_type"]](golden)
        return
    if diffuser.recognises(golden):
        diffuser.replay(golden)
        return
    unknown = sorted({path for path in classes if path not in build.OURS})
    if unknown:
        raise case.NotCovered(
            f"{golden.name}: {unknown[0]} is neither mapped in parity_tests/replay/build.py nor listed in "
            "parity_tests/not_implemented.py"
        )
    {"case": case.replay, "agent": agents.replay, "custom": custom.replay}[golden.kind](golden)
