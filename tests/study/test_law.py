"""The law finds what made its cells, knows its error, and says what it predicts before and after the runs."""

import numpy as np
import pytest
import yaml
from made_runs import Made
from matplotlib import pyplot

from t2i.errors import UserError
from t2i.report.sections.registry import make_section
from t2i.study.cost import run_costs
from t2i.study.jobs import read_study
from t2i.study.law import Cells, Law, fit_law
from t2i.study.spec import SectionSpec

TRUE = np.array([2.0, 0.0, 0.3, np.log(2.5), 0.35, np.log(0.4), 0.3, 0.2, 0.4])
UNITS = (1.2e6, 1.2e5, 1e6)
GRID = [
    (size, tokens, age)
    for size in (3e5, 8e5, 1.8e6, 3.8e6)
    for age in (0.0, 3e5, 3e6)
    for tokens in (3e4, 6e4, 1.2e5, 2.4e5)
]
NEW = [(6e6, 4.8e5, 0.0), (6e6, 4.8e5, 3e6), (1.8e6, 1.2e5, 1e6)]


def cells_of(places):
    sizes, tokens, ages = map(np.array, zip(*places, strict=True))
    return Cells([f"{size:g} after {age:g}" for size, _, age in places], sizes, tokens, ages)


@pytest.mark.parametrize("form", ["transferred tokens", "a lower loss"])
def test_a_law_is_found_from_its_cells_and_predicts_others(form, monkeypatch):
    monkeypatch.setattr("t2i.study.law.DRAWS", 20)
    true, random = Law(form, TRUE, UNITS), np.random.default_rng(0)
    exact = true.predict(cells_of(GRID))
    # A seed moves all cells alike, and each a little by itself.
    losses = exact + random.normal(0, 0.02, (3, 1)) + random.normal(0, 0.005, (3, len(GRID)))
    fit = fit_law(cells_of(GRID), losses)
    assert fit.law.form == form
    assert fit.rms < 0.01 < min(error for name, error in fit.left_out_rms().items() if name != form)
    loss, low, high = fit.predicted(cells_of(NEW))
    wanted = true.predict(cells_of(NEW))
    np.testing.assert_allclose(loss, wanted, atol=0.05)
    assert (low < loss).all() and (loss < high).all() and (high - low < 0.2).all()
    # What made them is found in any unit: a tenfold age multiplies the worth by 10^r.
    assert fit.law.values()["r"] == pytest.approx(0.4, abs=0.05)


def test_too_few_cells_are_no_law():
    few = [place for place in GRID if place[0] == 3e5][:8]
    with pytest.raises(ValueError, match="8 cells of 2 arms; expected more than 9 cells"):
        fit_law(cells_of(few), np.ones((2, 8)))


def size(width):
    return {"hidden_size": width, "num_heads": 2}


ARMS = {
    f"w{width}-{name}": {"model": {"init": f"{{out}}/language-{width}"} if age else size(width)}
    for width in (32, 64, 128)
    for name, age in (("random", 0), ("late", 5e5))
}


@pytest.fixture
def made(tmp_path):
    """A study of three widths, whose held-out arms are the widest; its losses are a law's."""
    made = Made(tmp_path, **{arm: [0, 1] for arm in ARMS})
    language = [
        {
            "name": f"language-{width}",
            "command": "launchers/train.py",
            "flags": {
                "run_dir": f"{{out}}/language-{width}",
                "model": size(width),
                "data": {"shards": "{out}/text"},
            },
        }
        for width in (32, 64, 128)
    ]
    own = {"arms": ARMS, "steps": language, "settings": {"data": {"shards": "{out}/images"}}}
    study = yaml.safe_load((tmp_path / "study.yaml").read_text()) | own
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    made.study = read_study(tmp_path / "study.yaml")
    return made


def law_section(made, **changed):
    arguments = {
        "ages": {arm: 5e5 if arm.endswith("late") else 0 for arm in ARMS},
        "steps": [2, 4, 6, 8, 10],
        "held_out": {"w128-random": [4, 10], "w128-late": [10]},
    }
    found = make_section(SectionSpec("law", arguments=arguments | changed), study=made.study, out=made.out)
    pyplot.close("all")
    return found


def train(made, arm, *, offset=0.0):
    law = Law("transferred tokens", TRUE, (1e5, 600, 1e6))
    size = {cost.name: cost.flops / cost.tokens / 6 for cost in run_costs(made.study, out=made.out)}
    for seed in (0, 1):
        one = size[f"{arm}-seed{seed}"]
        places = [(one, 100.0 * step, 5e5 if arm.endswith("late") else 0.0) for step in (2, 4, 6, 8, 10)]
        losses = law.predict(cells_of(places)) + offset + 0.01 * seed
        made.run(arm, seed, heldout=[{"image_loss": loss} for loss in losses.tolist()])


def test_cells_are_predicted_before_their_runs_and_the_prediction_stays(made, monkeypatch):
    monkeypatch.setattr("t2i.study.law.DRAWS", 20)
    assert "w32-random, w32-late, w64-random, w64-late have no finished runs" in law_section(made).found
    for arm in ARMS:
        if not arm.startswith("w128"):
            train(made, arm)
    before = law_section(made)
    assert "20 cells is fitted as " in before.found
    assert "3 held-out cells are predicted; none was run yet." in before.found
    assert {row[6] for row in before.table[1:]} == {"not run"}
    train(made, "w128-random")
    train(made, "w128-late", offset=5.0)
    after = law_section(made)
    assert [row[:6] for row in after.table] == [row[:6] for row in before.table]
    assert [row[7] for row in after.table[1:]] == ["inside", "inside", "outside"]
    assert "Of 3 held-out cells, 2 fell into their 90% intervals." in after.found


def test_a_start_that_is_not_made_yet_has_the_age_that_its_step_plans(made, monkeypatch):
    monkeypatch.setattr("t2i.study.law.DRAWS", 20)
    for arm in ARMS:
        if not arm.startswith("w128"):
            train(made, arm)
    ages = {arm: "{out}/language-128" if arm == "w128-late" else 0 for arm in ARMS} | {
        "w32-late": 5e5,
        "w64-late": 5e5,
    }
    found = law_section(made, ages=ages)
    (cost,) = [cost for cost in run_costs(made.study, out=made.out) if cost.name == "language-128"]
    assert [row[3] for row in found.table] == ["age", "0", "0", f"{cost.tokens:.3g}"]


def test_a_law_names_arms_of_the_study(made):
    with pytest.raises(UserError, match="law: w128-rando is no arm of the study; perhaps w128-random"):
        law_section(made, held_out={"w128-rando": [4]})
    for arm in ARMS:
        train(made, arm)
    with pytest.raises(UserError, match="law: held_out has step 7; measured are 2, 4, 6, 8, 10"):
        law_section(made, held_out={"w128-late": [7]})
    with pytest.raises(UserError, match="language-9 is no run that has trained"):
        law_section(made, ages={arm: "{out}/language-9" for arm in ARMS})


def test_a_start_that_a_step_has_yet_to_make_is_counted_by_its_size(made):
    flops = {cost.name: cost.flops for cost in run_costs(made.study, out=made.out)}
    assert flops["w128-late-seed0"] == flops["w128-random-seed0"] > 2 * flops["w64-late-seed0"]


def test_a_law_of_no_arm_is_refused_before_anything_runs(made):
    file = made.out / "study.yaml"
    entry = {"section": "law", "ages": {"w32-random": 0}, "steps": [2], "held_out": {"w128-rando": [2]}}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"report": [entry]}))
    with pytest.raises(UserError, match="names arm w128-rando; perhaps w128-random was meant"):
        read_study(file)
