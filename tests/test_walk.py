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
    """Run a command as a person would."""
    done = processes.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_warm(*words):
    """Run a command in a process that has imported its libraries: one cold start of a kind tells enough."""
    done = processes.run_warm(words, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_take_a_run_folder_a_checkpoint_and_an_export(finished, tmp_path):
    exported = tmp_path / "exported"
    run("launchers/export.py", finished.run_dir, "--out", exported)
    checkpoint = finished.run_dir / "checkpoints" / "step_000006"
    words = ["--prompts", "picture 3", "picture 4", "--seed", "7", "--out"]
    run("launchers/sample.py", finished.run_dir, *words, tmp_path / "run")
    for name, ckpt in (("checkpoint", checkpoint), ("export", exported)):
        run_warm("launchers/sample.py", ckpt, *words, tmp_path / name)
    pictures = [(tmp_path / name / "00001.png").read_bytes() for name in ("run", "checkpoint")]
    assert pictures[0] == pictures[1]
    printed = run_warm("eval/coco_fid.py", exported, "--num-samples", "10", "--out", tmp_path / "scores")
    assert "fd_efficientnet_lite0" in printed
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores["n"] == 10 and scores["captions_heard"]["heldout"]["own"] > 0


def test_shards_are_checked_and_the_tokenizer_measured(shards, tmp_path):
    printed = run_warm("launchers/prepare.py", "--check", shards, "--sheet", tmp_path / "sheet.png")
    assert "all readable and in range" in printed
    assert printed.count("64 codes:") == 8
    assert Image.open(tmp_path / "sheet.png").height > 8 * 64


def test_a_source_is_looked_at_before_anything_is_written(tmp_path):
    printed = run_warm("launchers/prepare.py", "--preview", "3", "--sheet", tmp_path / "sheet.png")
    assert printed.count("64 codes:") == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "sheet.png"]


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_every_file_that_the_docs_name_exists(page):
    named = re.findall(r"`((?:t2i|launchers|eval|docs|ds_configs)/[\w./-]*)`", (ROOT / page).read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
