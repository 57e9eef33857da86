"""Runs as arrays: which runs, which seeds beside which, which steps."""

import pytest
from made_runs import Made

from t2i.study.results import curve, paired, runs_of


@pytest.fixture
def made(tmp_path):
    made = Made(tmp_path, fast=[0, 1, 2, 3], slow=[3, 1, 4])
    for seed in (0, 1, 2):
        made.run("fast", seed, heldout=[{"image_loss": 10 * seed + place} for place in range(3)])
    made.run("fast", 3, heldout=[{"image_loss": 30.0}, {"image_loss": 31.0}])
    for seed in (3, 1):
        made.run("slow", seed, heldout=[{"image_loss": 100 + 10 * seed + place} for place in range(3)])
    made.run("slow", 4, heldout=[{"image_loss": float("nan")}] * 3, state="failed")
    return made


def held_out(made, arm):
    return curve(runs_of(made.study, arm=arm, out=made.out), value="image_loss", split="heldout")


def test_an_arm_is_its_finished_runs_at_the_steps_of_all(made):
    fast, slow = held_out(made, "fast"), held_out(made, "slow")
    assert (fast.seeds, slow.seeds) == ([0, 1, 2, 3], [3, 1])
    assert (fast.steps, fast.tokens) == ([2, 4], [200, 400])
    assert fast.values.tolist() == [[0, 1], [10, 11], [20, 21], [30, 31]]
    assert slow.values.tolist() == [[130, 131, 132], [110, 111, 112]]
    assert curve([], value="image_loss") is None


def test_a_seed_is_paired_with_itself(made):
    first, second = paired(held_out(made, "fast"), held_out(made, "slow"))
    assert first.seeds == second.seeds == [1, 3]
    assert first.steps == second.steps == [2, 4]
    assert first.values.tolist() == [[10, 11], [30, 31]]
    assert second.values.tolist() == [[110, 111], [130, 131]]


def test_arms_without_a_seed_in_common_are_no_pair(made):
    made.run("slow", 1, state="failed")
    made.run("slow", 3, state="running")
    assert paired(held_out(made, "fast"), held_out(made, "slow")) is None


def test_steps_whose_tokens_nobody_counted_are_left_out(tmp_path):
    """Runs of 0.1 have no training row of a step that train.log_every skips."""
    made = Made(tmp_path, one=[0])
    folder = made.run("one", 0, heldout=[{"image_loss": 3.0}, {"image_loss": 2.0}])
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(row for row in rows if '"step": 4, "tokens"' not in row))
    assert held_out(made, "one").steps == [2]
