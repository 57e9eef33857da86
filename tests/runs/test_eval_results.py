"""Scores in the hub's forms: complete, and read back as they were measured."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from t2i.errors import UserError
from t2i.measure.compare import check_protocols, read_scores
from t2i.runs.card import front_matter
from t2i.runs.eval_results import write_eval_results

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0_1_0"
SCORES = next(WRITTEN.rglob("scores.json"))


@pytest.fixture
def scores():
    values = json.loads(SCORES.read_text())
    key = values["measures"][0]
    values["rows"]["model"]["intervals"] = {key: [values[key] - 1, values[key] + 2]}
    return values


@pytest.fixture
def listed(scores, tmp_path):
    write_eval_results(scores, file=tmp_path / ".eval_results" / "scores.yaml")
    return tmp_path / ".eval_results" / "scores.yaml"


def test_every_entry_has_what_the_hubs_form_asks_for(scores, listed):
    entries = yaml.safe_load(listed.read_text())
    assert [entry["dataset"]["task_id"] for entry in entries] == scores["measures"]
    assert all(set(entry) == {"dataset", "value", "notes"} for entry in entries)
    notes = yaml.safe_load(entries[0]["notes"])
    assert notes["n"] == scores["n"]
    assert notes["interval"] == scores["rows"]["model"]["intervals"][scores["measures"][0]]


def test_a_file_of_results_is_compared_as_the_scores_it_came_from(scores, listed, tmp_path):
    read, original = read_scores(listed), read_scores(SCORES)
    check_protocols(read, original)
    assert read.rows["model"].measures == original.rows["model"].measures
    (tmp_path / "other.json").write_text(json.dumps({**scores, "resize": "another rule"}))
    with pytest.raises(UserError, match="resize: "):
        check_protocols(read, read_scores(tmp_path / "other.json"))


def test_the_cards_index_says_how_each_number_was_measured(scores):
    card = ModelCard(f"---\n{front_matter([scores], name='x', kind='open_lm')}\n---\n# x\n")
    first = card.data.eval_results[0]
    assert first.metric_value == round(scores[scores["measures"][0]], 4)
    assert first.metric_args["n"] == scores["n"]
    assert first.metric_args["interval"] == scores["rows"]["model"]["intervals"][scores["measures"][0]]
    assert {"reference_sha256", "captions_sha256", "resize"} <= set(first.metric_args)


@pytest.mark.parametrize(
    "text", ["- 3", "a: b", "- {value: x, notes: y}", "- {value: 1, notes: '- a'}", "- &a {b: *a}"]
)
def test_another_file_is_refused(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError):
        read_scores(tmp_path / "x.yaml")
