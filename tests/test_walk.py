"""The README's commands, run as a person would, on a tiny run."""

import json
import re
import sys
from pathlib import Path

import processes
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(*words):
    done = processes.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_take_a_run_folder_a_checkpoint_and_an_export(finished, tmp_path):
    exported = tmp_path / "exported"
    run("launchers/export.py", finished.run_dir, "--out", exported)
    checkpoint = finished.run_dir / "checkpoints" / "step_000006"
    for name, ckpt in (("run", finished.run_dir), ("checkpoint", checkpoint), ("export", exported)):
        run(
            "launchers/sample.py",
            ckpt,
            "--prompts",
            "picture 3",
            "picture 4",
            "--out",
            tmp_path / name,
            "--seed",
            "7",
        )
    pictures = [(tmp_path / name / "00001.png").read_bytes() for name in ("run", "checkpoint")]
    assert pictures[0] == pictures[1]
    printed = run("eval/coco_fid.py", exported, "--num-samples", "10", "--out", tmp_path / "scores")
    assert "fd_efficientnet_lite0" in printed
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores["n"] == 10 and scores["captions_heard"]["heldout"]["own"] > 0


def test_shards_are_checked_and_the_tokenizer_measured(shards, tmp_path):
    printed = run("launchers/prepare.py", "--check", shards, "--sheet", tmp_path / "sheet.png")
    assert "all readable and in range" in printed
    assert printed.count("64 codes:") == 8
    assert Image.open(tmp_path / "sheet.png").height > 8 * 64


def test_a_source_is_looked_at_before_anything_is_written(tmp_path):
    printed = run("launchers/prepare.py", "--preview", "3", "--sheet", tmp_path / "sheet.png")
    assert printed.count("64 codes:") == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "sheet.png"]


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_every_file_that_the_docs_name_exists(page):
    named = re.findall(r"`((?:t2i|launchers|eval|docs|ds_configs)/[\w./-]*)`", (ROOT / page).read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
