"""Run files and switches as strangers write them: what cannot be meant is a sentence that names file and key."""

import sys
from pathlib import Path

import pytest
import yaml

from t2i.cli import flags_of_mapping, parse
from t2i.commands.train import TrainCommand
from t2i.config import RunConfig
from t2i.errors import UserError
from t2i.runs.run_folder import plain


def read(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    return parse(TrainCommand, description="")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Parse a command line with a run file of this text."""

    def write(text):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return read(monkeypatch, "--config", file)

    return write


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run_dir:\n", "run_dir is empty; expected a path."),
        ("model: {init: null}\n", "model.init is empty; expected a text."),
        ("train: {lr: }\n", "train.lr is empty; expected a number >= 0."),
        ("data:\n", "data is empty; expected keys of its own, such as data.cache_limit."),
        ("data: [a, b]\n", "data is ['a', 'b']; expected keys of its own, such as data.cache_limit."),
        ("train: {compile: 'true'}\n", "train.compile is 'true'; expected yes or no."),
        ("train: {compile: 1}\n", "train.compile is 1; expected yes or no."),
        ("train: {seed: true}\n", "train.seed is True; expected a whole number >= 0."),
        ("train: {spike: off}\n", "train.spike is False; expected one of log, skip, rewind."),
        ("train: {lr: [1, 2]}\n", "train.lr is [1, 2]; expected a number >= 0."),
        ("train: {report_to: [{a: b}]}\n", "train.report_to is [{'a': 'b'}]; expected for each one of"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_file_and_key(text, said, written, tmp_path):
    with pytest.raises(UserError) as refusal:
        written(text)
    assert str(refusal.value).startswith(f"--config {tmp_path / 'run.yaml'}: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {seq_len: 100}\ndata.seq_len: 200\n", "has data.seq_len twice"),
        ("data: {seq_len: 1, seq-len: 2}\n", "has data.seq_len and data.seq-len, which are one setting"),
        ("model: {rows: mean, new_embeddings: own}\n", "has model.rows and model.new_embeddings, which"),
        ("train: {compile: true, no-compile: true}\n", "has train.compile and train.no-compile, which"),
        ("config: base.yaml\n", "has the key config; a run file names no other"),
        ("5: false\n", "has the key 5, which train.py does not take"),
        ("on: false\n", "has the key True, which train.py does not take"),
    ],
)
def test_a_key_that_cannot_be_meant_is_refused(text, said, written):
    with pytest.raises(UserError) as refusal:
        written(text)
    assert said in str(refusal.value)


def test_a_run_s_own_settings_are_a_run_file(written):
    command = written(yaml.safe_dump(plain(RunConfig())))
    assert RunConfig(command.run_dir, command.data, command.model, command.train) == RunConfig()


def test_a_name_that_begins_with_a_dash_is_no_flag(written):
    assert written("run_dir: -x\n").run_dir == Path("-x")
    assert flags_of_mapping({"a": -1, "b": ["x", "y"]}) == ["--a=-1", "--b", "x", "y"]


def test_the_home_folder_is_found_where_no_shell_looks_for_it(written, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    command = written("run_dir: ~/run\nmodel: {init: ~/lm}\n")
    assert (command.run_dir, command.model.init) == (Path("/home/ada/run"), "/home/ada/lm")
    assert read(monkeypatch, "--run-dir=~/run").run_dir == Path("/home/ada/run")


def test_of_two_run_files_the_last_counts(tmp_path, monkeypatch):
    for name, steps in (("a", 3), ("b", 5)):
        (tmp_path / name).write_text(f"train: {{max_steps: {steps}}}\n")
    command = read(monkeypatch, "--config", tmp_path / "a", f"--config={tmp_path / 'b'}")
    assert (command.train.max_steps, command.config) == (5, tmp_path / "b")


@pytest.mark.parametrize("flag", ["--run-dir", "--data.shards", "--config", "--data.replay-shards"])
def test_an_empty_path_is_refused_and_not_the_present_folder(flag, monkeypatch):
    with pytest.raises(UserError, match=r" is ''; expected a path"):
        read(monkeypatch, flag, "")


@pytest.mark.parametrize(
    "words", [["--train.compile", "True"], ["--train.compile=0"], ["--train.no_compile=no"]]
)
def test_a_switch_with_a_value_is_refused(words, monkeypatch):
    with pytest.raises(UserError, match=r"compile has the value '\w+'; expected no value"):
        read(monkeypatch, *words)


def test_a_command_line_without_a_word_has_its_defaults(monkeypatch):
    assert read(monkeypatch) == TrainCommand()
