"""The field's words in what people read: help, errors, docstrings, README and docs keep the old ones out."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNIT = (
    "nats|tokens|seconds|bytes|positions|dollars|sequences|images|codes|samples|rows|GPUs?|steps|bits|hours"
)
OF = "code|token|step|second|sequence|rank|GPU|image|run|batch|side|machine|split|seed|epoch|layer|caption|pixel|hour"
OLD_WORDS = {
    r"pictur(?!esque)\w*": "image",
    rf"\b(?:{UNIT}) an? (?:{OF})\b": "per, as in nats per code",
    r"\b(?:go|goes|going|gone|went) on (?:from|with|where|there|again|here)\b": "resume, continue",
    r"\bsame command goes on\b": "run the same command to resume",
    r"\bwanted\b(?! by)": "expected",
    r"\blearned numbers\b|\bnumbers that learn\b|\bwhat learns\b": "trainable parameters",
    r"\bof random weights\b|\bfrom random weights\b|\brandom weights of\b": "randomly initialised",
    r"\bcaption meters?\b": "caption sensitivity",
    r"\b(?:wrong|own|empty) captions?\b": "shuffled, matched, null caption",
    r"\bfloors?\b": "count-based baselines",
    r"\bpull to (?:the )?start\b": "L2-SP",
    r"\btext[ -]mix\b": "replay ratio",
    r"\bscrambl\w+": "control initialisation",
    r"\bgiven ids\b": "precomputed tokens",
    r"\bproducts alone\b": "matmul lower bound",
    r"\bsigns? of life\b": "heartbeat",
    r"\bin vain\b": "timed out",
    r"\bowe[sd]?\b|\bowing\b": "pending, deferred",
    r"\bseen people in unseen\b": "known emoji in held-out skin tones",
}
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/**/*.md")
MEASURED = ("docs/study/", "docs/reliability_report.md", "docs/performance.md")
"""Pages that commands write from results; they get today's words when they are next made."""


def texts_of(path):
    """Yield (line, text) of what a person may read: a page without its code, or the strings of a module."""
    content = path.read_text()
    if path.suffix == ".md":
        content = re.sub(r"```.*?```", lambda found: "\n" * found[0].count("\n"), content, flags=re.S)
        for number, line in enumerate(content.splitlines(), 1):
            if not line.startswith("    "):
                yield number, re.sub(r"`[^`]*`", "`", line)
        return
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for offset, line in enumerate(node.value.splitlines()):
                yield node.lineno + offset, re.sub(r"`[^`]*`", "`", line)


def files():
    pages = [path for pattern in PAGES for path in ROOT.glob(pattern)]
    modules = [path for room in ("t2i", "launchers", "eval") for path in (ROOT / room).rglob("*.py")]
    return [path for path in pages + modules if not str(path.relative_to(ROOT)).startswith(MEASURED)]


@pytest.mark.parametrize("old", OLD_WORDS)
def test_an_old_word_is_nowhere(old):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {text.strip()}"
        for path in files()
        for number, text in texts_of(path)
        if re.search(old, text)
    ]
    assert not found, f"say {OLD_WORDS[old]}:\n" + "\n".join(found)
