"""One number for a model's size: its two ends are the demo and the paper, and flags after it win."""

import sys

import pytest
import tyro
from conftest import ROOT

from t2i.cli import parse
from t2i.cli.run_file import flags_of
from t2i.commands.train import TrainCommand
from t2i.config import RunConfig
from t2i.config.size import DEMO, PAPER, size_settings
from t2i.errors import UserError


def value_of(config, key):
    group, _, name = key.rpartition(".")
    return getattr(getattr(config, group), name)


def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    return parse(TrainCommand, description="")


@pytest.mark.parametrize("size", [DEMO, PAPER])
def test_the_ends_are_the_demo_and_the_papers_run(size):
    paper = tyro.cli(RunConfig, args=flags_of(ROOT / "launchers" / "configs" / "paper_1b.yaml"))
    known = {DEMO: RunConfig(), PAPER: paper}[size]
    found = size_settings(size)
    assert found == {key: value_of(known, key) for key in found}


def test_between_the_ends_everything_grows_but_the_rate():
    sizes = [size_settings(number) for number in range(DEMO, PAPER + 1)]
    for key in sizes[0]:
        values = [each[key] for each in sizes]
        if key != "model.num_heads":  # heads become wider
            assert values == sorted(values, reverse=key == "train.lr"), key
    assert all(each["model.hidden_size"] % 64 == 0 for each in sizes)
    assert all(each["model.hidden_size"] / each["model.num_heads"] in (32, 64, 128) for each in sizes)
    assert len({each["model.hidden_size"] for each in sizes}) == len(sizes)


@pytest.mark.parametrize("words", [["--size", "12"], ["--size=12"]])
def test_flags_after_it_win(monkeypatch, words):
    command = parsed(monkeypatch, *words, "--train.lr", "0.5")
    assert (command.size, command.train.lr) == (12, 0.5)
    assert (command.model.num_layers, command.model.hidden_size, command.model.num_heads) == (12, 640, 10)
    assert command.train.global_batch_tokens == 58_368


def test_it_may_stand_in_a_run_file_and_wins_over_one_before_it(monkeypatch, tmp_path):
    (tmp_path / "run.yaml").write_text("size: 8\nmodel:\n  num_heads: 5\n")
    assert parsed(monkeypatch, "--config", str(tmp_path / "run.yaml")).model.hidden_size == 320
    assert parsed(monkeypatch, "--config", str(tmp_path / "run.yaml")).model.num_heads == 5
    assert parsed(monkeypatch, "--config", str(tmp_path / "run.yaml"), "--size", "12").model.num_heads == 10


@pytest.mark.parametrize("value", ["5", "25", "large"])
def test_other_numbers_are_refused(monkeypatch, value):
    with pytest.raises(UserError, match="size"):
        parsed(monkeypatch, "--size", value)
