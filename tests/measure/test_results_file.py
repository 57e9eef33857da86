"""Where a measure is written to is looked at before anything is measured."""

import json

import pytest

from t2i.measure import embeddings, forgetting, gradients, perplexity

COMMANDS = {
    "nearest": (embeddings, "compare_rows", ()),
    "gradients": (gradients, "gradient_shares", ()),
    "perplexity": (perplexity, "measure_perplexity", ()),
    "forgetting": (forgetting, "measure_forgetting", ("--text", "none.txt")),
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
