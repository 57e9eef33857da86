"""Two scores side by side: what must be equal, and what older files do without."""

import json
import shutil
from pathlib import Path

import pytest

from t2i.errors import UserError
from t2i.measure.compare import check_protocols, lone_judges, read_scores, table
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


def test_scores_without_a_judge_in_common_are_refused(tmp_path):
    other = {"pickscore": {"reward": "pickscore", "revision": "v1"}}
    first = scores(tmp_path, "a", **judges())
    with pytest.raises(UserError, match=r"judges: hpsv3 \| pickscore; expected one that judged both"):
        check_protocols(first, scores(tmp_path, "b", judges=other))
    both = scores(tmp_path, "c", judges={**judges()["judges"], **other})
    check_protocols(first, both)
    assert lone_judges(first, both) == ([], ["pickscore"])
    # The exact judge is no judge of others: it judges embedded images alone.
    exact = scores(tmp_path, "d", judges={"judge": {"sha256": "abc"}})
    check_protocols(first, exact)
    assert lone_judges(first, exact) == (["hpsv3"], [])


def test_a_judge_of_one_alone_is_named(tmp_path, call, capsys):
    scores(tmp_path, "a", **judges())
    scores(tmp_path, "b")
    assert call("eval/coco_fid.py", "compare", tmp_path / "a.json", tmp_path / "b.json") == 0
    assert f"as they judged {tmp_path / 'a.json'} alone: hpsv3." in capsys.readouterr().out


def test_a_misspelt_compare_is_no_checkpoint(call, capsys):
    assert call("eval/coco_fid.py", "comapre", "a.json", "b.json") != 0
    assert "perhaps you meant compare" in capsys.readouterr().err


def test_a_score_by_the_judge_that_chose_is_another_score(tmp_path):
    first = scores(tmp_path, "a", **judges())
    with pytest.raises(UserError, match=r"judges\.hpsv3\.chose_the_images: not stated \| True"):
        check_protocols(first, scores(tmp_path, "b", **judges(chose_the_images=True)))


def test_rules_of_clip_and_of_intervals_are_compared_where_both_have_them(tmp_path):
    clip, bootstrap = {"clip_rule": "100 max(cos, 0)"}, {"bootstrap": {"replicates": 100, "seed": 0}}
    first = scores(tmp_path, "a", **clip, **bootstrap)
    check_protocols(first, scores(tmp_path, "b"))
    with pytest.raises(UserError, match=r"clip_rule: 100 max\(cos, 0\) \| cos"):
        check_protocols(first, scores(tmp_path, "c", clip_rule="cos"))
    with pytest.raises(UserError, match=r"bootstrap\.replicates: 100 \| 200"):
        check_protocols(first, scores(tmp_path, "d", bootstrap={"replicates": 200, "seed": 0}))


def test_pixels_of_a_reference_are_compared_where_both_are_known(tmp_path):
    first = scores(tmp_path, "a", reference_pixels_sha256="1a")
    check_protocols(first, scores(tmp_path, "b"))
    with pytest.raises(UserError, match=r"reference_pixels_sha256: 1a \| 2b"):
        check_protocols(first, scores(tmp_path, "c", reference_pixels_sha256="2b"))


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
