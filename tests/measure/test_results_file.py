"""Where a measure is written to is looked at before anything is measured."""

import errno
import json

import pytest

from t2i.measure import embeddings, forgetting, gradients, perplexity

COMMANDS = {
    "nearest": (embeddings, "compare_rows", ()),
    "gradients": (gradients, "gradient_shares", ()),
    "perplexity": (perplexity, "measure_perplexity", ()),
    "forgetting": (forgetting, "measure_forgetting", ("--text", "docstrings:numpy")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_as_results_file_is_refused_before_anything_is_measured(
    command, finished, call, tmp_path, monkeypatch, capsys
):
    module, measure, flags = COMMANDS[command]
    monkeypatch.setattr(module, measure, lambda *args, **kwargs: pytest.fail("it was measured"))
    assert call(f"eval/{command}.py", finished.run_dir, *flags, "--out", tmp_path) == 2
    expected = f"--out {tmp_path} is a folder; expected a file, such as {tmp_path / command}.json."
    assert expected in capsys.readouterr().err


def test_the_folder_of_a_results_file_is_made(finished, call, tmp_path):
    out = tmp_path / "new" / "deep" / "near.json"
    assert call("eval/nearest.py", finished.run_dir, "--num-shown", 0, "--out", out) == 0
    assert json.loads(out.read_text())["checkpoint"].endswith("step_000006")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_something_else_is_not_replaced_by_results(
    command, finished, call, tmp_path, monkeypatch, capsys
):
    module, measure, flags = COMMANDS[command]
    monkeypatch.setattr(module, measure, lambda *args, **kwargs: pytest.fail("it was measured"))
    (tmp_path / "notes.txt").write_text("a note")
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    (tmp_path / "list.json").write_text("[1]")
    for name, said in (
        ("notes.txt", "ends in .txt; expected .json"),
        ("config.json", f"exists and is no {command}.json, so it is not replaced"),
        ("list.json", f"exists and is no {command}.json, so it is not replaced"),
    ):
        before = (tmp_path / name).read_bytes()
        assert call(f"eval/{command}.py", finished.run_dir, *flags, "--out", tmp_path / name) == 2
        assert f"--out {tmp_path / name} {said}" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(
    command, finished, call, tmp_path, monkeypatch, capsys
):
    module, measure, flags = COMMANDS[command]
    monkeypatch.setattr(module, measure, lambda *args, **kwargs: pytest.fail("it was measured"))

    def refused(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("t2i.files.TemporaryFile", refused)
    assert call(f"eval/{command}.py", finished.run_dir, *flags, "--out", tmp_path / "a.json") == 2
    assert (
        f"{tmp_path} cannot be written: Permission denied. Name another place with --out."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--reference", "runs/pretrianed"],
            "runs/pretrianed is no run folder, checkpoint or exported folder",
        ),
        (["--captions", "images"], "--captions images is no folder of shards: it has no manifest.json"),
        (["--captions", "notes.txt"], "--captions notes.txt is no folder of shards: it is a file"),
        (["--captions", "imagse"], "--captions imagse is no folder of shards: it does not exist here"),
        (
            ["--text", "data/mien"],
            "--text is data/mien, of which no text can be read: data/mien does not exist",
        ),
    ],
)
def test_a_slip_in_the_last_flag_is_said_before_the_first_model_is_measured(
    words, said, finished, call, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "notes.txt").write_text("a note of some words")
    monkeypatch.setattr(
        forgetting, "measure_forgetting", lambda *args, **kwargs: pytest.fail("it was measured")
    )
    assert call("eval/forgetting.py", finished.run_dir, "--text", "notes.txt", *words) in (2, 3)
    assert said in capsys.readouterr().err
