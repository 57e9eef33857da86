"""The reference pages are fresh, and their tables say what real folders, rows and sources have."""

import ast
import importlib.util
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from t2i.env import VARIABLES
from t2i.runs import contents
from t2i.runs.checkpoint_store import last_step, step_folder
from t2i.runs.export import export
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"[A-Z][A-Z0-9_]{3,}")


def made_pages():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_the_pages_are_what_the_code_says():
    there = {path.name: path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")}
    assert there == made_pages(), "docs/reference/ is not fresh: run `make reference`"


def check_folder(folder, entries):
    """Every file has an entry, and every entry that is always there has a file."""
    names = [f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir()]
    assert [name for name in names if not any(fnmatch(name, entry.name) for entry in entries)] == []
    always = [entry.name for entry in entries if entry.is_always_there]
    assert [pattern for pattern in always if not any(fnmatch(name, pattern) for name in names)] == []


def test_folders_hold_what_the_page_says(finished, tmp_path):
    run_dir = finished.run_dir
    check_folder(run_dir, contents.RUN_FOLDER)
    check_folder(step_folder(run_dir, last_step(run_dir)), contents.CHECKPOINT)
    check_folder(finished.data.shards, contents.SHARDS)
    export(open_model(str(run_dir), needs_images=True), out=tmp_path / "exported", command="t2i export")
    check_folder(tmp_path / "exported", contents.EXPORT)


def test_a_file_that_the_page_lacks_would_be_seen(tmp_path):
    (tmp_path / "secret.bin").touch()
    with pytest.raises(AssertionError, match="secret.bin"):
        check_folder(tmp_path, contents.EXPORT)


def test_rows_have_the_keys_that_the_page_says(finished):
    rows = read_metrics(finished.run_dir)
    for is_heldout, entries in ((False, contents.STEP_KEYS), (True, contents.HELDOUT_KEYS)):
        keys = {key for row in rows if ("split" in row) == is_heldout for key in row}
        assert keys <= {entry.name for entry in entries}
        assert {entry.name for entry in entries if entry.is_always_there} <= keys


def variables_of(source):
    """List the names by which a file reads or sets os.environ, and every literal that could be one."""
    tree = ast.parse(source)
    literals = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            used.add(node.slice)
        if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            used.add(node.left)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("os.environ."):
            used.update(node.args[:1])
            literals |= {word.arg for word in node.keywords if word.arg}
    named = {name.value for name in used if isinstance(name, ast.Constant)}
    return named, {text for text in literals if NAME.fullmatch(text)}


def test_every_environment_variable_is_on_the_page():
    used, literals = set(), set()
    for path in (ROOT / "t2i").rglob("*.py"):
        named, words = variables_of(path.read_text())
        used |= named
        literals |= words if path.name != "env.py" else named
    assert used <= set(VARIABLES)
    assert set(VARIABLES) <= literals


def test_a_variable_that_the_page_lacks_would_be_seen():
    source = 'os.environ.get("T2I_A", "")\n"T2I_B" in os.environ\nos.environ["T2I_C"]'
    assert variables_of(source) == ({"T2I_A", "T2I_B", "T2I_C"},) * 2
