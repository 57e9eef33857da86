"""Shares of what captions state: computed once more image by image, and intervals by drawing captions again."""

import numpy as np
import pytest

from t2i.measure.compare import verdict_line
from t2i.measure.judge import Judge
from t2i.measure.measures import bootstrap_counts
from t2i.measure.pairing import Pairing, Row, exact_scores, with_pairing
from t2i.measure.protocol import JudgeScores
from t2i.measure.verdict import FEWEST, judged

CAPTIONS = [
    *["red apple", "blue book", "green apple"] * 4,
    *["woman climbing: dark skin tone", "man cook", "thumbs up"] * 8,
    *["flag: Suriname"] * 3,
    *["stadium"] * 6,
]


def read_at_random(seed=0):
    """What a judge that is right about half of the time reads from every image."""
    rng = np.random.default_rng(seed)
    values = {
        "kind": ["person", "hand", "flag"],
        "colour": ["red", "blue", "green"],
        "tone": ["none", "dark"],
        "flag": ["yes", "no"],
        "count": ["1", "2"],
    }
    return {name: rng.choice(choice, len(CAPTIONS)).tolist() for name, choice in values.items()}


def shares(read, places):
    """The two measures by plain counting, of captions that may come again."""
    from t2i.measure.attributes import attributes_of

    whole = [attributes_of(caption) for caption in CAPTIONS]
    kept = [name for name in read if sum(name in said for said in whole) >= FEWEST]
    by_name = {
        name: [read[name][at] == whole[at][name] for at in places if name in whole[at]] for name in read
    }
    means = [sum(by_name[name]) / len(by_name[name]) for name in kept if by_name[name]]
    facts = [right for each in by_name.values() for right in each]
    return sum(means) / len(means), sum(facts) / len(facts)


def test_the_mean_is_over_attributes_and_the_pooled_share_over_facts():
    read = read_at_random()
    verdict = judged(read, CAPTIONS)
    found = verdict.estimates(replicates=0)
    wanted = shares(read, range(len(CAPTIONS)))
    assert [found["judge"].value, found["judge_pooled"].value] == pytest.approx(wanted)
    assert found["judge"].interval is None and verdict.mean() == found["judge"].value
    assert verdict.n == {"kind": 27, "colour": 12, "tone": 24, "flag": 3, "count": 16}
    # Three captions state a flag, which are too few to count as much as 27 of a kind.
    assert verdict.averaged == ["kind", "tone"]
    assert f"flag {verdict.accuracy['flag']:.0%} of 3 (too few for the mean)" in verdict_line(
        verdict.to_json()
    )


def test_intervals_draw_the_captions_again_as_those_of_distances_do():
    read = read_at_random()
    found = judged(read, CAPTIONS).estimates(replicates=60)
    drawn = [
        shares(read, np.repeat(np.arange(len(CAPTIONS)), count))
        for count in bootstrap_counts(len(CAPTIONS), replicates=60)
    ]
    for key, values in zip(("judge", "judge_pooled"), np.array(drawn).T, strict=True):
        reach = 1.96 * values.std(ddof=1)
        assert found[key].interval == pytest.approx((found[key].value - reach, found[key].value + reach))


def test_intervals_hold_the_share_of_all_captions_about_as_often_as_they_say():
    """Of a judge that is right seven times in ten, 300 sets of 40 captions with one fact each."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        read = np.where(rng.random(40) < 0.7, "red", "blue").tolist()
        low, high = judged({"colour": read}, ["red apple"] * 40).estimates(replicates=100)["judge"].interval
        held += low <= 0.7 <= high
    assert 0.9 < held / 300 < 0.98


def test_rare_facts_that_a_drawing_leaves_out_are_left_out_of_its_mean():
    captions = ["red apple"] * 10 + ["blue book"] * 10 + ["stadium"] * 180
    read = {"colour": ["red"] * 10 + ["green"] * 190}
    (low, high) = judged(read, captions).estimates(replicates=500)["judge"].interval
    assert np.isfinite([low, high]).all() and (low + high) / 2 == pytest.approx(0.5)
    few = judged(read, captions[:9]).estimates(replicates=500)
    assert few["judge_pooled"].interval is None


def scores_of(monkeypatch, captions, read):
    monkeypatch.setattr(Judge, "read", lambda self, images: read)
    judge = Judge({"data": "a test"}, {}, mean=None, scale=None)
    rows = {"model": Row("model", list(range(len(captions))))}
    paired = Pairing(captions, {"model": []}, rows)
    return paired, exact_scores(paired, judge, replicates=50)


def test_rows_carry_both_measures_with_their_intervals(monkeypatch):
    paired, scores = scores_of(monkeypatch, CAPTIONS, read_at_random())
    row = with_pairing({}, clip=None, judges={"judge": scores}, pairing=paired)["model"].to_json()
    low, high = row["intervals"]["judge_pooled"]
    assert low < row["judge_pooled"] < high and set(row["intervals"]) == {"judge", "judge_pooled"}
    # A judge of others that gives no intervals leaves these as they are.
    other = JudgeScores({}, rows={"model": {"hpsv3": 9.0}}, details={})
    judges = {"judge": scores, "hpsv3": other}
    both = with_pairing({}, clip=None, judges=judges, pairing=paired)["model"].to_json()
    assert both == {**row, "hpsv3": 9.0}


def test_captions_that_state_nothing_have_no_measure_and_a_line_says_so(monkeypatch):
    read = {"colour": ["red"] * 12}
    paired, scores = scores_of(monkeypatch, ["stadium"] * 12, read)
    assert scores.rows == {} and with_pairing({}, clip=None, judges={"judge": scores}, pairing=paired) == {}
    assert verdict_line(scores.details["model"]).startswith("no caption states a kind, colour, skin tone")
    # Four facts are too few for the mean, and are still facts.
    few = judged(read, ["red apple"] * 4 + ["stadium"] * 8)
    assert few.mean() is None and few.estimates(replicates=0)["judge_pooled"].value == 1
