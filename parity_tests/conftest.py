"""Set-up of the ladder: few threads, deterministic drawing of examples, and a line that counts the recorded cases."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
for _threads in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(_threads, "1")  # everything here is tiny: threads would only wait for each other

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "parity",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=15,
    print_blob=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),  # no shrinking: examples are small already
)
hypothesis.settings.load_profile("parity")


def pytest_collection_modifyitems(config, items):
    """Live comparisons exist only with a checkout to compare with."""
    for marker in ("upstream", "upstream_diffuser", "upstream_kuka", "upstream_reinflow"):
        if config.getoption("--" + marker.replace("_", "-")):
            continue
        live = [item for item in items if item.get_closest_marker(marker)]
        if live:
            config.hook.pytest_deselected(items=live)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]


def pytest_configure(config):
    config.addinivalue_line("markers", "upstream: compares with a live checkout of the reference (--upstream PATH)")
    config.addinivalue_line("markers", "upstream_diffuser: the same of jannerm/diffuser (--upstream-diffuser PATH)")
    config.addinivalue_line("markers", "upstream_reinflow: the same of ReinFlow (--upstream-reinflow PATH)")
    config.addinivalue_line("markers", "upstream_kuka: the same of its branch kuka (--upstream-kuka PATH)")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """Counts of recorded cases; nothing is skipped without its name in parity_tests/not_implemented.py."""
    stats = terminalreporter.stats
    counts = {
        outcome: [r for r in stats.get(outcome, []) if "test_goldens.py::test_golden[" in getattr(r, "nodeid", "")]
        for outcome in ("passed", "failed", "skipped")
    }
    if not any(counts.values()):
        return
    terminalreporter.section("recorded cases of the reference")
    terminalreporter.write_line(
        f"{len(counts['passed'])} passed, {len(counts['failed'])} failed, "
        f"{len(counts['skipped'])} not implemented (parity_tests/not_implemented.py)"
    )
    for report in counts["skipped"]:
        name = report.nodeid.split("[", 1)[1].rstrip("]")
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        terminalreporter.write_line(f"  {name}: {reason}")
