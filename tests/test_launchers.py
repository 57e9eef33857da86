"""Every command's first contact: help without torch, the nearest right key, exit status and sentence."""

import logging
import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest

from t2i.cli import flags_of, parse, quiet_libraries
from t2i.config import DataConfig, PrepareConfig, RunConfig, SampleConfig, SourceConfig, TokenizerConfig
from t2i.env import use_own_tools
from t2i.errors import UserError, run_command

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    str(path.relative_to(ROOT)) for folder in ("launchers", "eval") for path in (ROOT / folder).glob("*.py")
)


@dataclass(frozen=True)
class WithRunFile(RunConfig):
    config: Path | None = None


def run(*words):
    return processes.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_imports_no_torch():
    """In one process: what one command imported would be seen in all later ones, and is seen at once."""
    check = f"""
import runpy, sys
for command in {COMMANDS!r}:
    print("command", command)
    sys.argv = [command, "--help"]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, None), (command, end.code)
    heavy = {{"torch", "transformers", "diffusers", "numpy", "PIL"}} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    done = run("-c", check)
    assert done.returncode == 0, done.stderr
    said = re.split(r"^command (.+)\n", done.stdout, flags=re.M)[1:]
    helps = dict(zip(said[::2], said[1::2], strict=True))
    assert list(helps) == COMMANDS
    assert [command for command, text in helps.items() if "Example" not in text] == []


def test_a_wrong_key_names_the_nearest_right_one(call, capsys):
    assert call("launchers/train.py", "--train.warmup-step", "3") == 2
    assert "--train.warmup-steps" in capsys.readouterr().err


def test_wrong_use_is_a_sentence_and_status_2():
    done = run("launchers/prepare.py")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert (
        done.stderr.strip() == "give one of --out DIR to prepare, --check DIR to check, --preview N to look."
    )


def test_a_missing_source_is_status_3(tmp_path, call, capsys):
    assert call("launchers/prepare.py", "--source", tmp_path / "nowhere", "--out", tmp_path / "out") == 3
    assert "nowhere is not `openmoji`" in capsys.readouterr().err


def test_a_path_that_cannot_be_written_is_a_sentence_and_status_5(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as ended:
        run_command((tmp_path / "file" / "folder").mkdir)
    assert ended.value.code == 5
    assert capsys.readouterr().err == f"{tmp_path / 'file' / 'folder'}: Not a directory.\n"


def test_impossible_numbers_are_refused_by_key():
    sentence = "--views is 0; expected a whole number from 1 to 1,000. --workers is -1; expected a whole number from 0"
    with pytest.raises(UserError, match=sentence):
        PrepareConfig(views=0, workers=-1)
    with pytest.raises(UserError, match="data.seq_len is 0"):
        DataConfig(seq_len=0)
    with pytest.raises(UserError, match="--max-steps is -1; expected a whole number >= 1"):
        TokenizerConfig(max_steps=-1)


def test_run_files_are_flags_written_down(tmp_path):
    (tmp_path / "run.yaml").write_text("run_dir: runs/x\ndata: {seq_len: 80}\nmodel: {qk_norm: false}\n")
    assert flags_of(tmp_path / "run.yaml") == [
        "--run_dir",
        "runs/x",
        "--data.seq_len",
        "80",
        "--model.no-qk_norm",
    ]
    (tmp_path / "bad.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="holds list; expected a mapping"):
        flags_of(tmp_path / "bad.yaml")


def test_a_run_file_is_named_in_either_spelling(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("train: {max_steps: 7}\n")
    for words in (["--config", str(tmp_path / "run.yaml")], [f"--config={tmp_path / 'run.yaml'}"]):
        monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank=0", *words])
        assert parse(WithRunFile, description="").train.max_steps == 7


def test_the_environments_own_programs_are_found_without_activating_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    use_own_tools()
    assert Path(shutil.which("ninja")).parent == Path(sys.executable).parent


def test_a_value_that_no_sampler_can_have_is_a_sentence(call, capsys):
    assert call("launchers/sample.py", "x", "--prompts", "a", "--out", "b", "--top-p", "2") == 2
    assert capsys.readouterr().err.strip().startswith("--top-p is 2.0; expected")


def test_a_share_that_leaves_nothing_to_train_on_is_refused(call, capsys):
    assert call("launchers/prepare.py", "--out", "b", "--heldout-share", "1") == 2
    sentence = "--heldout-share is 1.0; expected a number >= 0 and < 1 or None."
    assert capsys.readouterr().err.strip() == sentence


@pytest.mark.parametrize(
    "numbers",
    [
        {"guidance_scale": math.nan},
        {"guidance_scale": -1.0},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": math.nan},
        {"seed": -1},
    ],
)
def test_a_sampler_has_numbers_that_can_be_drawn_with(numbers):
    ((key, value),) = numbers.items()
    with pytest.raises(UserError, match=f"^--{key.replace('_', '-')} is {value}; expected a "):
        SampleConfig(**numbers)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"min_side": -5}, "--min-side is -5; expected a whole number >= 0"),
        ({"max_aspect": math.nan}, "--max-aspect is nan; expected a number >= 1 or 0"),
        ({"max_aspect": 0.5}, "--max-aspect is 0.5; expected a number >= 1 or 0"),
        ({"max_caption": -3}, "--max-caption is -3; expected a whole number >= 0"),
        ({"min_caption": 9, "max_caption": 5}, "--max-caption is 5; expected at least --min-caption 9"),
        ({"score_key": "s", "min_score": math.nan}, "--min-score is nan; expected a number or None"),
    ],
)
def test_a_filter_that_would_keep_nothing_or_do_nothing_is_refused(numbers, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        SourceConfig(**numbers)


def test_deepspeed_is_quiet_although_its_import_sets_a_level_anew():
    quiet_libraries()
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)
    said = {
        level: bool(deepspeed.filter(deepspeed.makeRecord("", level, "", 0, "", (), None)))
        for level in (30, 40)
    }
    assert said == {logging.WARNING: False, logging.ERROR: True}


def test_the_environment_is_described():
    done = run("-m", "t2i.env")
    assert done.returncode == 0
    assert {"torch", "deepspeed", "g++", "shared"} <= {line.split()[0] for line in done.stdout.splitlines()}
