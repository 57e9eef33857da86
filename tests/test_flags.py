"""Command lines: every number of every command has a range, and whatever is wrong is one sentence with its key."""

import io
import math
import os
import re
import shlex
import sys
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, get_args, get_origin

import processes
import pytest

from t2i.__main__ import VERBS, module_of
from t2i.cli import parse
from t2i.cli.names import flag_names, nearest
from t2i.cli.rules import PACKAGE
from t2i.commands import gradients, perplexity, report, sample, score, scores, tokenizer, train
from t2i.errors import READER_GONE, CheckpointError, UserError, run_command
from t2i.settings import MAX_WHOLE, expected, hints_of

ROOT = Path(__file__).parents[1]
COMMANDS = {
    (verb, name): kind
    for verb in VERBS
    for name, kind in vars(import_module(f"t2i.commands.{module_of(verb)}")).items()
    if is_dataclass(kind) and kind.__module__ == f"t2i.commands.{module_of(verb)}"
}
"""Dataclasses that commands parse, by verb and name: `tokenizer` has two, one for each subcommand."""
WRONG = ("nan", "inf", "-inf", "abc", str(10**20), str(-(10**20)), "", "1e400")
TRIED = (-1, 0, 1, 10**12, 1e12, math.nan, math.inf, 10**20)


def numbers(kind, *, prefix=""):
    """List flags of numbers: name, annotation, and the class that the field is of."""
    for name, hint in hints_of(kind).items():
        inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if is_dataclass(inner):
            is_flat = any(getattr(mark, "name", None) == "" for mark in getattr(hint, "__metadata__", ()))
            yield from numbers(inner, prefix=prefix if is_flat else f"{prefix}{name}.")
        elif "number" in expected(hint):
            yield f"--{prefix}{name.replace('_', '-')}", hint, kind


ALL = sorted({(flag, verb) for (verb, _), kind in COMMANDS.items() for flag, _, _ in numbers(kind)})


def words_for(kind):
    """Return the least that a command asks for."""
    words = []
    for one in fields(kind):
        hint = hints_of(kind)[one.name]
        if one.default is MISSING and one.default_factory is MISSING:
            is_flag = one.name.replace("_", "-") in flag_names(kind)
            words += [f"--{one.name}", "x"] if is_flag else []
            words = words if is_flag else ["x", *words]
            assert not is_dataclass(hint)
    return words


def parsed(monkeypatch, kind, *words, prog="t2i verb"):
    monkeypatch.setattr(sys, "argv", [prog, *words])
    return parse(kind, description="", has_run_file=False)


def test_every_command_is_looked_at():
    assert len(COMMANDS) >= 20 and {verb for verb, _ in COMMANDS} == set(VERBS)
    assert len(ALL) > 100


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=lambda kind: kind.__name__)
def test_every_number_of_a_command_has_a_range(kind):
    bounds = (">", "from")
    free = [flag for flag, hint, _ in numbers(kind) if not any(sign in expected(hint) for sign in bounds)]
    assert free in ([], ["--min-score"])  # a score may be any number


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=lambda kind: kind.__name__)
def test_what_is_no_number_is_a_sentence_with_its_key(kind, monkeypatch):
    flags = [flag for flag, _, _ in numbers(kind)]
    if not flags:
        return
    for value in WRONG:
        # All at once, and each must be in a sentence: those of one group come together.
        with pytest.raises(UserError) as refusal:
            parsed(
                monkeypatch,
                kind,
                *words_for(kind),
                *(word for flag in flags for word in (f"{flag}={value}",)),
            )
        assert refusal.value.exit_code == 2
        said = str(refusal.value).replace("_", "-")
        assert any(f"{flag.removeprefix('--')} is " in said for flag in flags), said
        assert "expected" in str(refusal.value)


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=lambda kind: kind.__name__)
def test_a_number_is_refused_by_its_flag_or_taken(kind, monkeypatch):
    # Not by a command line each, which would take minutes: by the class of the field, which each line makes.
    for flag, hint, owner in numbers(kind):
        name = flag.rpartition(".")[2].removeprefix("--").replace("-", "_")
        needed = {
            one.name: "x"
            for one in fields(owner)
            if one.default is MISSING and one.default_factory is MISSING
        }
        for value in TRIED:
            try:
                made = owner(**needed, **{name: (value,) if "each" in expected(hint) else value})
            except UserError as error:
                assert name.replace("_", "-") in str(error).replace("_", "-"), error
                continue
            if "__post_init__" in vars(owner):  # others are checked by parse
                found = getattr(made, name)
                most = MAX_WHOLE if "whole" in expected(hint) else math.inf
                assert all(abs(one) < most for one in (found if isinstance(found, tuple) else (found,)))


def test_a_wrong_choice_is_a_sentence(monkeypatch):
    with pytest.raises(
        UserError, match=r"^--layout is 'square'; expected one of plain, geneval, geneval2, dpg\.$"
    ):
        parsed(monkeypatch, sample.SampleCommand, "x", "--prompts", "a", "--out", "b", "--layout", "square")
    with pytest.raises(
        UserError, match=r"^data\.mode is 'video'; expected one of text-to-image, .* or None\.$"
    ):
        parsed(monkeypatch, perplexity.PerplexityCommand, "x", "--data.mode", "video")


@pytest.mark.parametrize(
    ("kind", "words", "sentence"),
    [
        (sample.SampleCommand, ["x", "--outt", "b"], "no flag --outt; perhaps you meant --out."),
        (sample.SampleCommand, ["--outt=b"], "no flag --outt; perhaps you meant --out."),
        (
            train.TrainCommand,
            ["--max-steps", "4"],
            "no flag --max-steps; perhaps you meant --train.max-steps.",
        ),
        (train.TrainCommand, ["--train.no-deterministc"], "perhaps you meant --train.no-deterministic"),
        (train.TrainCommand, ["--train.maxsteps", "4"], "perhaps you meant --train.max-steps"),
        (train.TrainCommand, ["--zebra"], "There is no flag --zebra. `t2i verb --help` lists all flags."),
    ],
)
def test_a_misspelt_flag_is_a_sentence_with_the_nearest_names(kind, words, sentence, monkeypatch):
    with pytest.raises(UserError) as refusal:
        parsed(monkeypatch, kind, *words)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "words", "sentence"),
    [
        (
            score.ScoreCommand,
            ["comapre", "a.json", "b c"],
            "a.json 'b c': no flag takes this. `t2i verb` takes CKPT, and all else behind the names of flags, which"
            " `t2i verb --help` lists.",
        ),
        (scores.CompareCommand, ["a", "b", "c"], "c: no flag takes this. `t2i verb` takes A and B, and all"),
        (report.ReportCommand, ["a", "b"], "b: no flag takes this. `t2i verb` takes RUN, and all"),
        (
            tokenizer.Train | tokenizer.Evaluate,
            ["evaluate", "x", "--source", "a", "--out", "b"],
            "x: no flag takes this. `t2i verb` takes all behind",
        ),
        (train.TrainCommand, ["6"], "6: no flag takes this. `t2i verb` takes all behind the names of flags"),
    ],
)
def test_a_word_too_many_is_a_sentence(kind, words, sentence, monkeypatch):
    with pytest.raises(UserError) as refusal:
        parsed(monkeypatch, kind, *words)
    assert str(refusal.value).startswith(sentence)


@pytest.mark.parametrize(("verb", "name"), COMMANDS)
def test_every_flag_of_the_help_is_known_and_its_default_said_once(verb, name, monkeypatch, capsys):
    kind = COMMANDS[verb, name]
    with pytest.raises(SystemExit) as end:
        parsed(monkeypatch, kind, "--help")
    assert end.value.code in (0, None)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    known = flag_names(kind)
    assert all(f"--{flag}" in shown for flag in known if not nearest_is_switch(flag, known))
    assert "(default: )" not in shown and str(PACKAGE.parent) not in shown
    texts = shown.split(" --")
    assert not [one for one in texts if "Default:" in one and "(default:" in one]
    if "ckpt" in hints_of(kind):
        assert " CKPT " in shown and " STR A run folder" not in shown


def nearest_is_switch(flag, known):
    """Tell whether a flag is the negation of another, which --help may write in short."""
    return flag.rpartition(".")[2].startswith("no-") and flag.replace("no-", "", 1) in known


def test_nothing_near_is_suggested_for_nothing_like_it():
    assert nearest("--zebra", {"out", "layout"}, form="--{}") == ""


def test_a_key_of_a_run_file_that_is_none_is_named_with_its_file(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text("train: {max_stps: 4}\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file)])
    with pytest.raises(UserError) as refusal:
        parse(train.TrainCommand, description="")
    assert str(refusal.value).startswith(
        f"--config {file} has the key train.max_stps, which train.py does not take"
    )
    assert "perhaps you meant train.max_steps" in str(refusal.value)
    file.write_text("train: {max-steps: 4, eval_pictures: 3}\nmodel: {qk_norm: true}\n")
    assert parse(train.TrainCommand, description="").train.max_steps == 4


def test_shards_are_named_alike_wherever_a_model_is_measured(monkeypatch):
    for kind in (gradients.GradientsCommand, perplexity.PerplexityCommand):
        for flag in ("--data.shards", "--shards"):
            assert parsed(monkeypatch, kind, "x", flag, "y").data.shards == Path("y")


@pytest.mark.parametrize("words", [("-m", "t2i", "--help"), ("launchers/train.py", "--help")])
def test_help_that_nobody_reads_to_its_end_complains_of_nothing(words):
    read, write = os.pipe()
    os.close(read)  # as `head` does when it has its lines
    with os.fdopen(write, "w") as pipe:
        done = processes.run(
            [sys.executable, *words], cwd=ROOT, stdout=pipe, stderr=-1, text=True, timeout=120
        )
    assert (done.returncode, done.stderr) == (READER_GONE, "")


@pytest.mark.parametrize(("stdout", "code"), [(None, 2), ("/dev/full", CheckpointError.exit_code)])
def test_an_output_that_takes_nothing_changes_no_other_status(stdout, code):
    """Closed before the command begins, as a supervisor may do; and on a disk that is full."""
    script = "from t2i.errors import UserError, run_command\ndef command():\n    print('x')\n"
    script += "    raise UserError('a sentence')\n" if stdout is None else ""
    words = shlex.join([sys.executable, "-c", f"{script}run_command(command)"])
    done = processes.run(
        ["bash", "-c", f"{words} {'>&-' if stdout is None else f'> {stdout}'}"],
        cwd=ROOT, stderr=-1, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert re.fullmatch(r"a sentence\n" if stdout is None else r".*No space left on device\.\n", done.stderr)


def test_another_broken_pipe_is_still_an_error(monkeypatch, capsys):
    def command():
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert end.value.code == 5
