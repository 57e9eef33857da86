"""What people would see of each arm: measures of drawn images, such as the exact judge's, beside the losses."""

from pathlib import Path

import numpy as np

from t2i.report.sections.section import Section, SectionKind, interval, p_value
from t2i.study.measured import Score, read_score
from t2i.study.results import runs_of
from t2i.study.spec import Study
from t2i.study.statistics import corrected, paired_test


def scores(study: Study, out: Path, *, arms: list[str], measures: list[str]) -> Section:
    """Tabulate measures of scores.json by arm; of two arms, test the difference of each, seed by seed.

    Args:
        measures: keys of scores.json, such as judge and mind_efficientnet_lite0.
    """
    found = {arm: _scores_of(study, out, arm=arm, measures=measures) for arm in arms}
    table = [["arm", *measures, "images", "seeds"]]
    for arm, seeds in found.items():
        if seeds:
            cells = [_mean_and_range([seeds[seed][name].value for seed in seeds]) for name in measures]
            images = {score.num_images for one in seeds.values() for score in one.values()}
            table.append([arm, *cells, " or ".join(map(str, sorted(images))), str(len(seeds))])
    if len(table) == 1:
        return Section("What is drawn", f"No run has {' and '.join(measures)}.")
    sentence = f"Mean over seeds and their range, of {len(table) - 1} arms."
    if len(arms) == 2 and (common := sorted(found[arms[0]].keys() & found[arms[1]].keys())):
        sentence += _differences(found, arms=arms, measures=measures, seeds=common)
    return Section("What is drawn", sentence, table=table)


def _scores_of(study: Study, out: Path, *, arm: str, measures: list[str]) -> dict[int, dict[str, Score]]:
    """Read the measures of an arm's runs by seed; a run that lacks one is left out."""
    found: dict[int, dict[str, Score]] = {}
    for run in runs_of(study, arm=arm, out=out):
        read = {name: read_score(run.folder, measure=name) for name in measures}
        known = {name: score for name, score in read.items() if score is not None}
        if len(known) == len(measures):
            found[run.seed] = known
    return found


def _mean_and_range(values: list[float]) -> str:
    return f"{np.mean(values):.4g}" + (
        f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
    )


def _differences(
    found: dict[str, dict[int, dict[str, Score]]], *, arms: list[str], measures: list[str], seeds: list[int]
) -> str:
    """Test the difference of two arms in each measure, corrected for their number."""
    tests = {
        name: paired_test(*([found[arm][seed][name].value for seed in seeds] for arm in arms))
        for name in measures
    }
    parts = [
        f"{name} {test.mean:+.4g} {interval(test.low, test.high, '{:+.4g}')}, p = {p_value(p)}"
        for (name, test), p in zip(
            tests.items(), corrected([test.p_value for test in tests.values()]), strict=True
        )
    ]
    return (
        f" {arms[0]} - {arms[1]}, paired t-tests over {len(seeds)} seeds, corrected for their number (Holm):"
        f" {'; '.join(parts)}."
    )


SECTIONS = (SectionKind("scores", reads="scores.json of runs", make=scores),)
