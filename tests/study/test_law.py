"""The law finds what made its cells, knows its error, and says what it predicts before and after the runs."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_runs import Made
from matplotlib import pyplot

from t2i.errors import UserError
from t2i.report.sections.registry import make_section
from t2i.report.study import write_study_report
from t2i.study.cost import run_costs
from t2i.study.jobs import jobs_of, read_study
from t2i.study.law import FORMS, Cells, Law, fit_law, half_width, nearest, pairs_of
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
    return Cells(*map(np.array, zip(*places, strict=True)))


@pytest.mark.parametrize("form", ["transferred tokens", "a lower loss"])
def test_a_law_is_found_from_its_cells_and_predicts_others(form):
    true, random = Law(form, TRUE, UNITS), np.random.default_rng(0)
    fit = fit_law(cells_of(GRID), true.predict(cells_of(GRID)) + random.normal(0, 0.005, len(GRID)))
    assert fit.law.form == form
    assert fit.rms < 0.01 < min(one.rms for name, one in fit.left_out.items() if name != form)
    loss, low, high = fit.predicted(cells_of(NEW))
    np.testing.assert_allclose(loss, true.predict(cells_of(NEW)), atol=0.05)
    assert (low < loss).all() and (loss < high).all() and (high - low < 0.2).all()
    # What made them is found in any unit: a tenfold age multiplies the worth by 10^r.
    assert fit.law.values()["r"] == pytest.approx(0.4, abs=0.05)
    low, high = fit.range_of("r")
    assert low < fit.law.values()["r"] < high


def test_intervals_hold_a_size_that_lies_off_the_law_as_the_fitted_ones_do(monkeypatch):
    form = "transferred tokens"
    monkeypatch.setattr("t2i.study.law.FORMS", {form: FORMS[form]})
    cells = cells_of([*GRID, *((8e6, tokens, age) for tokens in (6e4, 2.4e5) for age in (0.0, 3e5, 3e6))])
    exact, is_fitted = Law(form, TRUE, UNITS).predict(cells), cells.parameters < 8e6
    sizes, place = np.unique(cells.parameters, return_inverse=True)
    inside = []
    for seed in range(16):
        random = np.random.default_rng(seed)
        losses = exact + random.normal(0, 0.04, len(sizes))[place] + random.normal(0, 0.01, len(exact))
        _, low, high = fit_law(cells.kept(is_fitted), losses[is_fitted]).predicted(cells.kept(~is_fitted))
        inside.append((low <= losses[~is_fitted]) & (losses[~is_fitted] <= high))
    # Errors of single arms, left out beside others of their size, would make intervals that hold a quarter of them.
    assert np.mean(inside) >= 0.8


def test_an_interval_is_of_as_many_degrees_of_freedom_as_folds():
    found = half_width([np.full(12, 0.1), np.full(12, -0.1), np.empty(0)])
    assert found == pytest.approx(0.1 * 2.92, rel=1e-3)  # of a table: t of 0.95 with 2 degrees


def test_what_pretraining_is_worth_is_predicted_more_narrowly_than_losses():
    true, random = Law("transferred tokens", TRUE, UNITS), np.random.default_rng(0)
    cells = cells_of([*GRID, *((8e6, tokens, age) for tokens in (6e4, 2.4e5) for age in (0.0, 3e5, 3e6))])
    sizes, place = np.unique(cells.parameters, return_inverse=True)
    # Each size lies off the law in all its arms alike, which differences do not see.
    losses = true.predict(cells) + random.normal(0, 0.04, len(sizes))[place]
    is_fitted = cells.parameters < 8e6
    fit, new = fit_law(cells.kept(is_fitted), losses[is_fitted]), cells.kept(~is_fitted)
    (_, *bounds), (worth, low, high) = fit.predicted(new), fit.predicted_worth(new)
    pretrained = new.ages > 0
    assert (high - low < np.diff(bounds, axis=0)[0] / 2).all()
    measured = np.array(
        [losses[~is_fitted][place] - losses[~is_fitted][base] for place, base in pairs_of(new)]
    )
    assert ((low[pretrained] <= measured) & (measured <= high[pretrained])).all()
    assert (worth[pretrained] < 0).all() and (worth[~pretrained] == 0).all()


def test_the_nearest_cell_is_of_the_same_kind_of_start_and_of_the_same_tokens():
    cells, losses = cells_of(GRID), np.arange(float(len(GRID)))
    asked = cells_of([(6e6, 2.4e5, 0.0), (6e6, 2.4e5, 3e6), (3e5, 3e4, 4e5), (3e5, 9e5, 3e6)])
    places = [
        GRID.index(one)
        for one in ((3.8e6, 2.4e5, 0.0), (3.8e6, 2.4e5, 3e6), (3e5, 3e4, 3e5), (3e5, 2.4e5, 3e6))
    ]
    assert nearest(cells, losses, asked=asked).tolist() == places


def test_too_few_sizes_or_ages_are_no_law():
    few = [place for place in GRID if place[0] > 3e5]
    with pytest.raises(
        ValueError, match="3 sizes and 2 ages of pre-trained starts; expected at least 4 and 2"
    ):
        fit_law(cells_of(few), np.ones(len(few)))


def size(width):
    return {"hidden_size": width, "num_heads": 2}


AGES = {"random": 0, "early": 2e5, "middle": 6e5, "late": 2e6}
ARMS = {
    f"w{width}-{name}": {"model": {"init": f"{{out}}/language-{width}"} if age else size(width)}
    for width in (32, 64, 96, 128, 192)
    for name, age in AGES.items()
    if name != "middle" and (width, name) != (192, "early")
}
FITTED = [arm for arm in ARMS if not arm.startswith("w192")]


@pytest.fixture
def made(tmp_path):
    """A study of five widths, whose held-out arms are the widest; its losses are nearly a law's."""
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
        for width in (32, 64, 96, 128, 192)
    ]
    own = {"arms": ARMS, "steps": language, "settings": {"data": {"shards": "{out}/images"}}}
    study = yaml.safe_load((tmp_path / "study.yaml").read_text()) | own
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    made.study = read_study(tmp_path / "study.yaml")
    return made


@pytest.fixture(autouse=True, scope="module")
def fits():
    """Fit equal cells once: most reports here are of the same ones, and a fit takes seconds."""
    found = {}

    def once(cells, losses):
        key = tuple(values.tobytes() for values in (cells.parameters, cells.tokens, cells.ages, losses))
        if key not in found:
            found[key] = fit_law(cells, losses)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t2i.report.sections.law.fit_law", once)
        yield


def law_section(made, **changed):
    arguments = {
        "ages": {arm: AGES[arm.split("-")[1]] for arm in ARMS},
        "steps": [2, 4, 6, 8, 10],
        "held_out": {"w192-random": [4, 10], "w192-late": [10]},
    }
    found = make_section(SectionSpec("law", arguments=arguments | changed), study=made.study, out=made.out)
    pyplot.close("all")
    return found


def train(made, *arms, seeds=(0, 1), offset=0.0, steps=5):
    """Write runs at steps 2, 4, 6 and so on, with losses of a law and a hundredth of a nat beside it."""
    law = Law("transferred tokens", TRUE, (1e6, 600, 1e6))
    for arm in arms:
        width, name = arm[1:].split("-")
        places = [(100.0 * int(width) ** 2, 200.0 * step, float(AGES[name])) for step in range(1, steps + 1)]
        noise = np.random.default_rng(list(arm.encode())).normal(0, 0.01)
        for seed in seeds:
            losses = law.predict(cells_of(places)) + noise + offset + 0.5 * seed
            made.run(arm, seed, heldout=[{"image_loss": loss} for loss in losses.tolist()])


def test_cells_are_predicted_before_their_runs_and_the_prediction_stays(made):
    assert "Nothing is fitted: no seed is finished at steps [2, 4, 6, 8, 10]." in law_section(made).found
    train(made, *FITTED)
    before = law_section(made)
    assert "60 cells, means over seeds 0, 1, is fitted as " in before.found
    assert "3 held-out cells are predicted; none is finished yet." in before.found
    assert {row[7] for row in before.table[1:]} == {"not finished"}
    assert [row[0] for row in before.table[1:]] == [
        "w192-random, step 4", "w192-random, step 10", "w192-late, step 10", "w192-late - w192-random, step 10",
    ]  # fmt: skip
    # Of one seed, a cell would be compared with a prediction of the mean of two.
    train(made, "w192-random", seeds=[0])
    assert law_section(made).table == before.table
    train(made, "w192-random")
    train(made, "w192-late", offset=5.0)
    after = law_section(made)
    assert [row[:7] for row in after.table] == [row[:7] for row in before.table]
    assert [row[8] for row in after.table[1:]] == ["inside", "inside", "outside", "outside"]
    assert "Of 3 held-out cells, 2 fell into their 90% intervals; of 1 sizes, 0 did with every" in after.found
    assert (
        "Of 1 differences to the random start, 0 fell into theirs; 0 of these intervals hold no difference"
        in after.found
    )
    measured, predicted = (float(after.table[4][column]) for column in (7, 4))
    assert (
        f"error of a difference is {abs(measured - predicted):.3f} nats, that of no difference {measured:.3f}."
        in after.found
    )


def test_a_cell_that_never_came_stays_in_what_it_is_counted_among(made):
    train(made, *FITTED, "w192-random")
    assert "Of 3 held-out cells, 2 fell into their 90% intervals and 1 are not finished; of 1 sizes" in (
        law_section(made).found
    )


def test_a_law_says_where_its_forms_forbid_what_the_cells_show(made):
    train(made, *(arm for arm in FITTED if arm.endswith("random")))
    train(made, *(arm for arm in FITTED if not arm.endswith("random")), offset=3.0)  # pre-training does harm
    found = law_section(made).found
    assert "Pre-training is ahead of the random start in 0 of 40 fitted cells." in found
    assert "Both forms have it ahead everywhere, so in the others the law is off." in found
    assert re.search(r"At an end of the range that a fit chooses from: [^.]*\bK\b", found)
    train(made, *(arm for arm in FITTED if not arm.endswith("random")))
    ahead = law_section(made).found
    assert "ahead of the random start in 40 of 40" in ahead and "Both forms have it" not in ahead


def test_what_no_interval_holds_is_said(made):
    train(made, *FITTED)
    found = law_section(made).found
    assert "the same pre-trained language model, so what another one would give is in no interval" in found
    assert "All arms are trained at 0.0015 as learning rate" in found


def test_cells_are_of_the_seeds_that_every_arm_has_finished(made):
    train(made, *FITTED, seeds=[1])
    alone = law_section(made)
    train(made, *(arm for arm in FITTED if arm != "w64-late"))
    found = law_section(made)
    assert "Seed 0 is left out of all cells, since it is not finished in w64-late." in found.found
    assert found.table == alone.table


def test_an_arm_without_runs_is_left_out(made):
    train(made, *(arm for arm in FITTED if arm != "w64-late"))
    found = law_section(made)
    assert "55 cells" in found.found
    assert "Without finished runs, the cells of w64-late are left out." in found.found
    assert len(found.table) == 5


def test_seeds_that_failed_in_different_arms_leave_a_fit_of_the_others(made):
    train(made, *(arm for arm in FITTED if arm != "w32-early"), seeds=[0])
    train(made, *(arm for arm in FITTED if arm != "w64-late"), seeds=[1])
    found = law_section(made).found
    assert "55 cells, means over seeds 1, is fitted as" in found or "55 cells, means over seeds 0" in found
    assert "are left out: not measured at all of these steps, or by no seed that the others have" in found


def test_an_arm_that_was_trained_for_fewer_steps_is_left_out_by_name(made):
    train(made, "w32-random", steps=3)
    train(made, *(arm for arm in FITTED if arm != "w32-random"))
    assert (
        "The cells of w32-random are left out: not measured at all of these steps" in law_section(made).found
    )


def test_a_law_of_the_finished_sizes_alone_may_be_none(made):
    train(made, *(arm for arm in FITTED if not arm.startswith("w32")))
    assert "Nothing is fitted: 3 sizes and 2 ages" in law_section(made).found


def predictions_in(study, out):
    """Read the rows of cells in the report of a study."""
    page = write_study_report(study, jobs_of(study, out=out), out=out, command="")
    pyplot.close("all")
    lines = page.with_name("report.md").read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if ", step " in line]


def test_the_held_out_study_predicts_its_cells_before_they_run(made):
    study = read_study(Path("launchers/studies/law_held_out.yaml"))
    study = replace(study, report=study.report[:1])  # the law alone: other sections ask for checkpoints too
    held_out = [arm for arm in study.arms if arm.startswith("w192") or arm.endswith("middle")]
    train(made, *(arm for arm in study.arms if arm not in held_out), seeds=study.seeds, steps=200)
    before = predictions_in(study, made.out)
    train(made, *held_out, seeds=study.seeds, steps=200)
    after = predictions_in(study, made.out)
    assert len(before) == 18 and {row[7] for row in before} == {"not finished"}
    assert [row[:7] for row in after] == [row[:7] for row in before]
    assert not {row[7] for row in after} & {"not finished"}


def test_a_start_that_is_not_made_yet_has_the_age_that_its_step_plans(made):
    train(made, *FITTED)
    ages = {arm: "{out}/language-192" if arm == "w192-late" else AGES[arm.split("-")[1]] for arm in ARMS}
    found = law_section(made, ages=ages)
    (cost,) = [cost for cost in run_costs(made.study, out=made.out) if cost.name == "language-192"]
    assert [row[3] for row in found.table] == ["age", "0", "0", *[f"{cost.tokens:.3g}"] * 2]
    # Begun, and not done: there is a folder, and no checkpoint yet.
    (made.out / "language-192" / "checkpoints").mkdir(parents=True)
    assert law_section(made, ages=ages).table == found.table


def test_a_law_names_arms_of_the_study(made):
    with pytest.raises(UserError, match="law: w192-rando is no arm of the study; perhaps w192-random"):
        law_section(made, held_out={"w192-rando": [4]})
    train(made, *ARMS)
    with pytest.raises(UserError, match="law: held_out has step 7; measured are 2, 4, 6, 8, 10"):
        law_section(made, held_out={"w192-late": [7]})
    with pytest.raises(UserError, match="language-9 is no run that has trained"):
        law_section(made, ages={arm: "{out}/language-9" for arm in ARMS})


def test_a_start_that_a_step_has_yet_to_make_is_counted_by_its_size(made):
    flops = {cost.name: cost.flops for cost in run_costs(made.study, out=made.out)}
    assert flops["w192-late-seed0"] == flops["w192-random-seed0"] > 2 * flops["w64-late-seed0"]


def test_a_law_of_no_arm_is_refused_before_anything_runs(made):
    file = made.out / "study.yaml"
    entry = {"section": "law", "ages": {"w32-random": 0}, "steps": [2], "held_out": {"w192-rando": [2]}}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"report": [entry]}))
    with pytest.raises(UserError, match="names arm w192-rando; perhaps w192-random was meant"):
        read_study(file)
