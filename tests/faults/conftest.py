"""Faults injected into real runs, and the report of what was seen.

A test of a fault carries `@pytest.mark.fault(row, what, injected=..., expected=...)` and tells the `observed` fixture
what it saw. `make faults` runs all of them and writes docs/reliability_report.md; `make test` leaves out those marked
`slow`.
"""

import datetime
import platform
import re
import time
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import psutil
import pytest
import torch
from launched import LEARN, ROOT, Job

from t2i.runs.run_folder import git_commit

NUM_ROWS = 43
"""Of the list of faults; each has a line in the report, with or without a test."""

REPORT = """# Faults injected, and what happened

Written by `make faults`; each row is a test in `tests/faults/`.

| | |
| --- | --- |
| commit | {commit} |
| machine | {machine} |
| date | {date} |
| minutes | {minutes:.0f} |
| rows of the list | {num_rows} |
| faults injected | {injected} |
| survived as expected | {survived} |
| not injected here | {left_out} |
| deaths without notice | {deaths}, which cost {again} steps done again, at most {worst} each |
| stops that were asked for | {stops}, which cost {stop_steps} steps |

| row | fault | injected | expected | observed | |
| --- | --- | --- | --- | --- | --- |
{table}
"""


@dataclass
class Seen:
    """What one test saw."""

    text: str = ""
    deaths: tuple[int, ...] = ()
    """Steps that each death without notice cost."""
    stops: tuple[int, ...] = ()
    """Steps that each stop that was asked for cost."""


@dataclass(frozen=True)
class Row:
    """One test of a fault, as the report shows it."""

    cells: tuple[str, str, str, str]
    """Fault, injected, expected, result."""
    seen: Seen

    def line(self, number):
        what, injected, expected, result = self.cells
        return f"| {number} | {what} | {injected} | {expected} | {self.seen.text} | {result} |"


SEEN = pytest.StashKey[Seen]()
ROWS = pytest.StashKey[dict[tuple[int, str], Row]]()
STARTED = pytest.StashKey[float]()
COMMIT = pytest.StashKey[str]()


def pytest_addoption(parser):
    parser.addoption("--fault-report", type=Path, help="write a table of all faults to this file")


def pytest_sessionstart(session):
    session.config.stash[STARTED] = time.monotonic()
    session.config.stash[COMMIT] = git_commit() or "no checkout"


@pytest.fixture
def observed(request, tmp_path_factory):
    """Call it with what was seen, and with the steps that deaths and stops cost; the last call counts."""

    def note(text, *, deaths=(), stops=()):
        here = re.sub(rf"{tmp_path_factory.getbasetemp()}[\w/]*/", "", text)
        cell = " ".join(here.replace(str(ROOT), ".").replace("|", "\\|").split())
        request.node.stash[SEEN] = Seen(cell, tuple(deaths), tuple(stops))

    return note


@pytest.fixture(scope="session")
def proof(shards, tmp_path_factory):
    """launchers/verify_resume.py on two ranks: eight steps at once, then four and four more in another folder."""
    folder = tmp_path_factory.mktemp("proof") / "runs"
    job = Job(shards, folder, command="verify_resume", num_steps=8, **LEARN).run()
    assert job.code == 0, job.said()[-3000:]
    return job


@pytest.fixture(scope="session")
def whole(proof):
    """A run of two ranks that nothing disturbs."""
    return proof.run_dir / "whole"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    mark = item.get_closest_marker("fault")
    report = outcome.get_result()
    if mark is None or (report.when != "call" and report.passed):
        return
    row, what = mark.args
    why = report.longrepr[2] if report.skipped else ""
    result = "pass" if report.passed else f"not run: {why}" if report.skipped else "FAIL"
    cells = (what, mark.kwargs["injected"], mark.kwargs["expected"], result)
    item.config.stash.setdefault(ROWS, {})[row, item.nodeid] = Row(cells, item.stash.get(SEEN, Seen()))


def pytest_sessionfinish(session):
    path = session.config.getoption("--fault-report", default=None)
    if path:
        minutes = (time.monotonic() - session.config.stash[STARTED]) / 60
        stash = session.config.stash
        path.write_text(report_of(stash.get(ROWS, {}), minutes=minutes, commit=stash[COMMIT]))


def report_of(rows, *, minutes, commit):
    """Write the report of all rows, those without a test of this session among them."""
    results = [row.cells[-1] for row in rows.values()]
    left_out = sum(result.startswith("not run") for result in results)
    deaths = [steps for row in rows.values() for steps in row.seen.deaths]
    stops = [steps for row in rows.values() for steps in row.seen.stops]
    tested = {number for number, _ in rows}
    lines = [(number, row.line(number)) for (number, _), row in rows.items()]
    lines += [
        (number, f"| {number} | | | | | no test was run |")
        for number in range(1, NUM_ROWS + 1)
        if number not in tested
    ]
    return REPORT.format(
        commit=commit,
        machine=machine(),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        minutes=minutes,
        num_rows=f"{len(tested)} of {NUM_ROWS} with a test",
        injected=len(results) - left_out,
        survived=results.count("pass"),
        left_out=left_out,
        deaths=len(deaths),
        again=sum(deaths),
        worst=max(deaths, default=0),
        stops=len(stops),
        stop_steps=sum(stops),
        table="\n".join(line for _, line in sorted(lines, key=itemgetter(0))),
    )


def machine():
    """Say what the faults were injected on."""
    load = psutil.getloadavg()[1]
    memory = psutil.virtual_memory().total / 1e9
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{psutil.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GB, {device}, Linux {platform.release()},"
        f" Python {platform.python_version()}, torch {torch.__version__}; load of the last 5 minutes {load:.1f}"
    )
