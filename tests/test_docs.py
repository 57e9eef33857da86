"""Every command that the pages, the commands' own help and the Makefile show has flags that exist."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tyro

from t2i.__main__ import VERBS, dispatch

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "Makefile", "launchers/cluster/README.md"] + sorted(
    str(path.relative_to(ROOT))
    for pattern in ("docs/*.md", "t2i/commands/[a-z]*.py")
    for path in ROOT.glob(pattern)
)
SCRIPT = re.compile(
    r"(?:python|deepspeed|torchrun|launch|srun)\b[^`\n]*?\b((?:launchers|eval)/\w+\.py)([^`\n]*)"
)
VERB = re.compile(rf"(?:^ +|`|bin/|(?:-m|--module) )t2i ({'|'.join(VERBS)})\b([^`\n]*)", re.M)


class Parsed(BaseException):
    """The command line was understood; nothing more is to happen."""


def commands(page):
    """List (script or verb, words) of the commands in a page; a line that ends in \\ or precedes flags goes on."""
    text = re.sub(r"\\\n|\n(?=\s+--)", " ", (ROOT / page).read_text())
    return [(name, words_of(rest)) for name, rest in [*SCRIPT.findall(text), *VERB.findall(text)]]


def words_of(rest):
    try:
        words = shlex.split(rest, comments=True)
    except ValueError:  # the whole command stands in quotes, of which the last is here
        words = shlex.split(rest.rstrip()[:-1], comments=True)
    return [word for word in words if word != "..."]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_shown_has_flags_that_exist(page, monkeypatch):
    real = tyro.cli

    def parse_only(kind, **settings):
        real(kind, **settings)
        raise Parsed

    monkeypatch.setattr("tyro.cli", parse_only)
    monkeypatch.chdir(ROOT)
    for name, words in commands(page):
        with pytest.raises(Parsed):
            start(name, words, monkeypatch)


def start(name, words, monkeypatch):
    if name in VERBS:
        monkeypatch.setattr(sys, "argv", ["t2i", name, *words])
        dispatch()
    else:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(name, run_name="__main__")


def test_commands_are_found_wherever_they_are_shown():
    number = {page: len(commands(page)) for page in PAGES}
    assert all(
        number[page]
        for page in PAGES
        if page.startswith("t2i/commands/") and page != "t2i/commands/__init__.py"
    )
    assert number["README.md"] >= 5 and number["docs/data.md"] >= 15 and number["docs/weights.md"] >= 5
    assert number["docs/evaluation.md"] >= 5 and number["docs/scaling.md"] >= 3 and number["Makefile"] >= 5


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_every_target_of_make_that_a_page_names_exists(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^    )make ([\w-]+)", (ROOT / page).read_text(), re.M)) <= targets
