"""Two scores side by side: what must be equal, and what older files do without."""

import json
import shutil
from pathlib import Path

import pytest

from t2i.errors import UserError
from t2i.measure.compare import check_protocols, read_scores, table
from t2i.measure.protocol import RowScore

OLD = Path(__file__).parents[1] / "fixtures" / "written_by_0_1_0" / "run" / "eval" / "step_000004"


def scores(tmp_path, name, **changed):
    """Write the scores of an older version with entries of today's."""
    found = json.loads((OLD / "scores.json").read_text())
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps({**found, **changed}))
    return read_scores(file)


def judges(**protocol):
    return {"judges": {"hpsv3": {"reward": "hpsv3", "revision": "v3.0", **protocol}}}


def test_scores_of_two_judges_are_refused(tmp_path):
    first = scores(tmp_path, "a", **judges())
    check_protocols(first, scores(tmp_path, "b", **judges()))
    with pytest.raises(UserError, match=r"judges\.hpsv3\.revision: v3\.0 \| v2\.1"):
        check_protocols(first, scores(tmp_path, "c", **judges(revision="v2.1")))
    with pytest.raises(UserError, match=r"judges\.hpsv3\.prompts_sha256: not stated \| abc"):
        check_protocols(first, scores(tmp_path, "d", **judges(prompts_sha256="abc")))


def test_a_judge_of_one_alone_is_no_difference(tmp_path):
    other = {"judges": {"pickscore": {"revision": "v1"}}}
    check_protocols(scores(tmp_path, "a", **judges()), scores(tmp_path, "b", **other))


def test_measures_by_two_rules_are_refused(tmp_path):
    first = scores(tmp_path, "a", rules={"mind": "1,000 directions"})
    with pytest.raises(UserError, match=r"rules\.mind: 1,000 directions \| 100 directions"):
        check_protocols(first, scores(tmp_path, "b", rules={"mind": "100 directions"}))
    check_protocols(first, scores(tmp_path, "c", rules={"cmmd": "another"}))


def test_scores_from_before_there_were_rules_and_judges_still_compare(tmp_path):
    old = read_scores(OLD / "scores.json")
    assert "rules" not in old.entries
    check_protocols(old, scores(tmp_path, "a", rules={"mind": "1,000 directions"}, **judges()))
    shutil.copytree(OLD, tmp_path / "old")
    assert "fd_efficientnet_lite0" in table(old.rows.values(), measures=old.measures)[0]


def test_a_table_shows_half_of_an_interval_where_there_is_one():
    row = RowScore("drawn", n=5, measures={"fid": 12.5, "kid": 0.25}, intervals={"fid": (11.0, 14.0)})
    line = table([row], measures=["fid", "kid", "mind"])[1]
    assert line.split() == ["drawn", "5", "12.5000", "±1.5", "0.2500"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (3, "rows: model is 3; expected an object"),
        ({"what": "drawn", "n": 5, "fid": None}, "rows: model: fid is None; expected int or float"),
        ({"what": "drawn", "n": 5, "fid": 2.0, "intervals": 3}, "intervals is 3; expected two numbers per measure"),
        ({"what": "drawn", "n": 5, "fid": 2.0, "intervals": {"fid": [1, "a"]}}, "expected two numbers per measure"),
    ],
)  # fmt: skip
def test_rows_of_another_form_are_a_sentence(tmp_path, row, sentence):
    (tmp_path / "scores.json").write_text(json.dumps({"rows": {"model": row}, "measures": ["fid"]}))
    with pytest.raises(UserError, match=sentence):
        read_scores(tmp_path)
