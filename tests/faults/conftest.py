"""Faults injected into real runs, and the report of what was seen.

A test of a fault carries `@pytest.mark.fault(row, what, injected=..., expected=...)` and says with the `observed`
fixture what it saw. `make faults` runs all of them and writes docs/reliability_report.md; `make test` runs those that
are not also marked `slow`.
"""

from pathlib import Path

import pytest

REPORT_HEAD = """# Faults injected, and what happened

Written by `make faults`; each row is a test in tests/faults/.

| row | fault | injected | expected | observed | |
| --- | --- | --- | --- | --- | --- |
"""


def pytest_addoption(parser):
    parser.addoption("--fault-report", type=Path, help="write a table of all faults to this file")


@pytest.fixture
def observed(request):
    """Call it with what was seen; the last call counts."""

    def note(text):
        request.node.stash[OBSERVED] = text

    return note


OBSERVED = pytest.StashKey[str]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    mark = item.get_closest_marker("fault")
    report = outcome.get_result()
    if mark is None or (report.when != "call" and report.passed):
        return
    row, what = mark.args
    seen = item.stash.get(OBSERVED, "")
    why = report.longrepr[2] if report.skipped else ""
    result = "pass" if report.passed else f"not run: {why}" if report.skipped else "FAIL"
    cells = [what, mark.kwargs["injected"], mark.kwargs["expected"], seen, result]
    item.config.stash.setdefault(ROWS, {})[row, item.name] = cells


ROWS = pytest.StashKey[dict]()


def pytest_sessionfinish(session):
    path = session.config.getoption("--fault-report", default=None)
    if path:
        rows = sorted(session.config.stash.get(ROWS, {}).items())
        lines = [f"| {row} | " + " | ".join(cells) + " |" for (row, _), cells in rows]
        path.write_text(REPORT_HEAD + "\n".join(lines) + "\n")
