"""The report of `make faults`: every row of the list is in it, with a test or without."""

import re
from pathlib import Path

pytest_plugins = ["pytester"]
HERE = Path(__file__).parent


def test_every_row_of_the_list_has_a_test():
    sources = "".join(path.read_text() for path in HERE.glob("test_*.py") if path != Path(__file__))
    rows = {int(number) for number in re.findall(r"pytest\.mark\.fault\(\s*(\d+),", sources)}
    assert rows == set(range(1, 44))


FAULTS = """
import pytest

def fault(row):
    return pytest.mark.fault(row, f"fault {row}", injected="x", expected="y")

@fault(2)
def test_two(observed, tmp_path):
    observed(f"a | b in {tmp_path / 'file'}", deaths=[1, 3], stops=[0])

@fault(1)
def test_one():
    assert 1 == 2

@fault(1)
def test_another(observed):
    pytest.skip("no root here")

def test_of_no_fault():
    pass
"""


def test_the_report_counts_what_was_seen(pytester):
    pytester.makeconftest((HERE / "conftest.py").read_text())
    pytester.makepyfile(FAULTS)
    pytester.runpytest("--fault-report", "report.md", "-p", "no:cacheprovider")
    report = (pytester.path / "report.md").read_text()
    assert "| rows of the list | 2 of 43 with a test |" in report
    assert "| faults injected | 2 |" in report
    assert "| survived as expected | 1 |" in report
    assert "| not injected here | 1 |" in report
    assert "| deaths without notice | 2, which cost 4 steps done again, at most 3 each |" in report
    assert "| 2 | fault 2 | x | y | a \\| b in file | pass |" in report
    assert "| 1 | fault 1 | x | y |  | FAIL |" in report
    assert "| 1 | fault 1 | x | y |  | not run: Skipped: no root here |" in report
    assert (
        report.index("| 1 | fault 1")
        < report.index("| 2 | fault 2")
        < report.index("| 3 | | | | | no test was run |")
    )
    assert len(re.findall(r"^\| \d+ \|", report, flags=re.MULTILINE)) == 44
