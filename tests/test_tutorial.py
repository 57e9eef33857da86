"""Every block of the tutorial runs as it stands, in an empty folder, with fewer images and steps."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from t2i.__main__ import dispatch
from t2i.runs.metrics_log import read_metrics

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```python\n(?P<python>(?:.*\n)*?)```|^    t2i (?P<command>(?:.*\\\n)*.*)", re.M)
SMALLER = {
    "train": "--train.max-steps 4 --train.warmup-steps 2 --train.eval-every 2 --train.sample-every 2"
    " --train.global-batch-tokens 768 --train.eval-pictures 4 --model.num-layers 1 --model.hidden-size 32"
    " --model.num-heads 2",
}
"""Flags put after those of the page, so that they win."""


def blocks():
    """List the page's blocks in order, as (verb or `python`, text)."""
    found = []
    for block in BLOCK.finditer(PAGE.read_text()):
        command = (block["command"] or "").replace("\\\n", " ")
        found.append(("python", block["python"]) if block["python"] else (command.split()[0], command))
    return found


def test_the_story_has_every_verb_of_one_machine_in_its_order():
    assert [name for name, _ in blocks()] == [
        *("env", "python", "prepare", "prepare", "prepare", "train", "report", "sample", "score", "export")
    ]


@pytest.fixture
def said(tmp_path, monkeypatch, capfd, one_process):
    """Run all blocks in an empty folder; return what each printed, in order."""
    monkeypatch.chdir(tmp_path)
    said = []
    for name, text in blocks():
        if name == "python":
            assert "NUM_IMAGES = 1_200" in text
            exec(text.replace("NUM_IMAGES = 1_200", "NUM_IMAGES = 240"), {})
        else:
            monkeypatch.setattr(sys, "argv", ["t2i", *shlex.split(f"{text} {SMALLER.get(name, '')}")])
            dispatch()
        out, err = capfd.readouterr()
        said.append(out + err)
    return said


def test_one_sees_what_the_page_says(said, tmp_path, caplog):
    env, _, preview, prepared, checked, _, report, _, scored, _ = said
    assert "problem" in env
    assert preview.count("64 codes:") == 8 and Image.open(tmp_path / "sheet.png").height > 8 * 64
    assert re.search(r"\d+ train, \d+ heldout; 0 broken", prepared)
    assert Image.open(tmp_path / "data/mine/reconstructions.png").width > 64
    assert "all readable and in range" in checked
    rows = read_metrics(tmp_path / "runs/mine")
    assert [row["step"] for row in rows if row.get("split") == "heldout"] == [2, 4]
    assert {path.name for path in (tmp_path / "runs/mine/samples").glob("*.png")} == {
        "step_000002.png",
        "step_000004.png",
    }
    assert "report.html" in report and (tmp_path / "runs/mine/report.html").stat().st_size > 10_000
    assert [Image.open(tmp_path / f"images/0000{index}.png").size for index in range(3)] == [(64, 64)] * 3
    assert "shuffled" in scored or "another order" in scored
    assert (tmp_path / "exported/README.md").is_file()
