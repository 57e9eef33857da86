"""What all benchmarks share: rows are seen when they are known, and a quick run publishes nothing."""

import ast
import importlib.util
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT

BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
SHARED = ("side_by_side", "page", "guesses", "exactness")
BY_HAND = ("serving",)
"""`make bench` does not run it: it prints what the docs quote beside its command, and keeps no results."""

CONTESTS = ("speedrun",)
"""No comparison of candidates: whole runs, each kept on a page of its own. One seed (`--seeds 1`) is the short form."""


@pytest.fixture
def side_by_side(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import side_by_side

    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path / "results")
    return side_by_side


def test_rows_and_rounds_are_printed_when_they_are_known(side_by_side, capsys):
    clock = iter(range(100))
    seconds = side_by_side.alternate({"a": int, "b": int}, rounds=2, clock=lambda: float(next(clock)))
    assert capsys.readouterr().err.splitlines() == [
        "round 1 of 2: a 1 s, b 1 s",
        "round 2 of 2: a 1 s, b 1 s",
    ]
    side_by_side.compared("a / b", seconds["a"], seconds["b"], target="<= 1.1")
    assert capsys.readouterr().out == "a / b: 1 (1 to 1) <= 1.1 met\n"
    side_by_side.stated("share", [0.25, 0.5], target=">= 0.9", note="a guess")
    assert capsys.readouterr().out == "share: 0.25 (0.25 to 0.5) >= 0.9 NOT met a guess\n"


@pytest.mark.parametrize("is_quick", [False, True])
def test_a_quick_run_is_one_round_and_publishes_nothing(side_by_side, monkeypatch, is_quick):
    monkeypatch.setattr(sys, "argv", ["some.py", *(["--quick"] if is_quick else [])])
    parser = side_by_side.parser_of("A benchmark.")
    parser.add_argument("--samples", type=int, default=1_000)
    options = side_by_side.parse(parser, samples=10)
    assert (options.rounds, options.samples) == ((1, 10) if is_quick else (side_by_side.ROUNDS, 1_000))
    side_by_side.write("some", [], is_kept=not options.quick)
    assert (side_by_side.RESULTS / "some.json").exists() != is_quick


@pytest.mark.parametrize(
    "file", [file for file in BENCHMARKS if file.stem not in SHARED + CONTESTS], ids=lambda file: file.stem
)
def test_every_benchmark_has_a_quick_run(file):
    called = [
        ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
    ]
    assert any(call.startswith("side_by_side.parse(") for call in called)
    writes = [call for call in called if call.startswith("side_by_side.write(")]
    assert bool(writes) == (file.stem not in BY_HAND)
    assert file.stem == "precision" or all("is_kept=not options.quick" in call for call in writes)


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_what_a_benchmark_imports_of_t2i_exists(file):
    imports = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if (node.module or "").split(".")[0] == "t2i":
            module = importlib.import_module(node.module)
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            # A module of a package is its attribute only once it is imported.
            assert all(importlib.util.find_spec(f"{node.module}.{name}") for name in missing), missing


def test_results_of_a_clean_checkout_do_not_call_it_changed(side_by_side, monkeypatch, tmp_path):
    git = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    for name in ("code.py", "benchmarks/results/some.json", "docs/performance.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git(["git", "init", "--quiet"])
    git(["git", "add", "."])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all"])
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(side_by_side, "git_commit", lambda: "0123abc+")
    (tmp_path / "benchmarks/results/some.json").write_text("2")
    (tmp_path / "docs/performance.md").write_text("2")
    assert side_by_side.commit() == "0123abc"
    (tmp_path / "code.py").write_text("2")
    assert side_by_side.commit() == "0123abc+"
