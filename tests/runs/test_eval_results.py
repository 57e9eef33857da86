"""Scores in the hub's forms: complete, and read back as they were measured."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from t2i.errors import UserError
from t2i.measure.compare import check_protocols, differing_subjects, read_scores, table
from t2i.runs.card import front_matter
from t2i.runs.eval_results import write_eval_results
from t2i.runs.export import export
from t2i.runs.loading import open_model

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


def test_an_exports_card_is_compared_as_the_scores_it_was_made_from(
    scores, model_folder, tmp_path, call, capsys
):
    scores["rules"] = {key: "a rule" for key in scores["measures"]}
    measured = shutil.copytree(model_folder, tmp_path / "measured")
    (measured / "scores.json").write_text(json.dumps(scores))
    export(open_model(str(measured), needs_images=True), out=tmp_path / "exported", command="a test")
    card, file = tmp_path / "exported" / "README.md", tmp_path / "exported" / "scores.json"
    read, original = read_scores(card), read_scores(file)
    check_protocols(read, original)
    assert differing_subjects(read, original) == []
    told = {name for name in scores if name not in ("rows", "measures", "captions_heard", "judged")}
    assert {name: read.entries[name] for name in told - {*scores["measures"]}} == {
        name: scores[name] for name in told - {*scores["measures"]}
    }
    models = [table([each.rows["model"]], measures=each.measures) for each in (read, original)]
    assert models[0] == models[1] and "±1.5" in models[0][1]
    assert call("eval/coco_fid.py", "compare", card, file) == 0
    assert capsys.readouterr().out.endswith("They differ in (first | second):\n")
    (tmp_path / "other.json").write_text(json.dumps({**scores, "n": scores["n"] + 1}))
    with pytest.raises(UserError, match="n: "):
        check_protocols(read, read_scores(tmp_path / "other.json"))


def test_a_card_that_does_not_say_which_scores_are_meant_is_refused(scores, tmp_path):
    for measured, sentence in (
        ([scores, {**scores, "data": "coco"}], "has the data sets .*coco.*; expected one"),
        ([], "has the data sets none"),
    ):
        (tmp_path / "README.md").write_text(
            f"---\n{front_matter(measured, name='x', kind='open_lm')}\n---\n# x\n"
        )
        with pytest.raises(UserError, match=sentence):
            read_scores(tmp_path / "README.md")


@pytest.mark.parametrize(
    "index",
    [
        "3",
        "[{name: x, results: [{task: {type: a}, dataset: {type: a, name: b}, "
        "metrics: [{type: a, value: 1}]}]}]",
        "[{name: x, results: [{task: 1}]}]",
    ],
)
def test_a_card_of_elsewhere_is_refused(index, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nmodel-index: {index}\n---\n# x\n")
    with pytest.raises(UserError, match="holds no scores of an export"):
        read_scores(tmp_path / "README.md")


@pytest.mark.parametrize(
    "text", ["- 3", "a: b", "- {value: x, notes: y}", "- {value: 1, notes: '- a'}", "- &a {b: *a}"]
)
def test_another_file_is_refused(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError):
        read_scores(tmp_path / "x.yaml")
