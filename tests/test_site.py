"""The pages as a whole: links lead somewhere, the site shows every page and fetches nothing, badges are true."""

import re
import sys
import tomllib
from pathlib import Path

import processes
import pytest

import t2i

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "launchers/**/*.md", ".github/**/*.md", "t2i/assets/**/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def links(text):
    """List the targets of a page's links and images within the project."""
    return [target for target in LINK.findall(FENCE.sub("", text)) if not re.match(r"\w+:", target)]


def anchors(text):
    """List the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.M)
    kept = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"\s", "-", words) for words in kept} | {re.sub(r"[\s-]+", "-", words) for words in kept}


def broken_links(page):
    """List the links of a page that lead to no file, or to no heading of it."""
    found = []
    for target in links((ROOT / page).read_text()):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


def test_a_link_to_nowhere_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading: here\n[a](page.md#a-heading-here) [b](gone.md) ![c](page.md#elsewhere)\n")
    assert broken_links(page) == ["gone.md", "page.md#elsewhere"]


def test_the_navigation_names_every_page_once():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = re.findall(r": ([\w/.-]+\.md)$", navigation, re.M)
    there = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(named) == there


def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    built = processes.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    html = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    fetched = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    assert {str(path): fetched.findall(text) for path, text in html.items() if fetched.search(text)} == {}
    modules = [
        path.relative_to(ROOT) for path in (ROOT / "t2i").rglob("*.py") if not path.stem.startswith("__")
    ]
    ids = set(re.findall(r'id="(t2i[\w.]+)"', "".join(html.values())))
    assert {".".join(module.with_suffix("").parts) for module in modules} <= ids


def test_badges_and_the_changelog_say_what_the_project_says():
    assert PROJECT["license"] in (ROOT / "docs/badges/license.svg").read_text()
    assert (PROJECT["requires-python"], "3.11 | 3.12") == (
        ">=3.11,<3.13",
        re.search(r"python: ([\d.| ]+)", (ROOT / "docs/badges/python.svg").read_text())[1],
    )
    released = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == t2i.__version__
