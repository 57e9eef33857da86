"""What captions are worth in the words of training and in others: is the language known, or only the labels?"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from t2i.report.figures import finish, panels, styles
from t2i.report.sections.section import Section, SectionKind, difference, p_value
from t2i.study.measured import CaptionLosses, read_caption_losses
from t2i.study.results import runs_of
from t2i.study.spec import Study
from t2i.study.statistics import paired_test

Worths = dict[str, dict[int, CaptionLosses]]
"""Held-out split -> seed -> image losses under three captions."""


def wordings(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Tabulate the worth of captions (shuffled - matched) per held-out split, and compare the first two arms."""
    found: dict[str, Worths] = {arm: _read(study, out, arm) for arm in arms}
    splits = list(dict.fromkeys(split for worths in found.values() for split in worths))
    if not splits:
        return Section("Wordings", "No run's perplexity.json says what captions are worth.")
    first, second = arms[0], arms[1] if len(arms) > 1 else arms[0]
    head = [
        "held-out images",
        "images",
        *arms,
        *([f"{first} - {second}", "p", "seeds"] if second != first else []),
    ]
    table = [head]
    seen: list[str] = []
    for split in splits:
        by_arm = [found[arm].get(split, {}) for arm in arms]
        images = next(iter(next(one for one in by_arm if one).values())).num_pictures
        row = [split, f"{images:,}", *(_worth(one) for one in by_arm)]
        if second != first:
            seeds = sorted(by_arm[0].keys() & by_arm[1].keys())
            cells = ["no seed in common", "", "0"]
            if seeds:
                test = paired_test(*([one[seed].worth for seed in seeds] for one in by_arm[:2]))
                cells = [difference(test.mean, test.low, test.high), p_value(test.p_value), str(len(seeds))]
                seen += [f"{split} {cells[0]}"]
            row += cells
        table.append(row)
    compared = f" {first} - {second}: {'; '.join(seen)}." if seen else ""
    sentence = (
        "What a caption is worth: image loss under a shuffled caption minus under the matched one, in nats per code. In"
        f" words that training never had, only a model that knew the language can gain.{compared}"
    )
    return Section("Wordings", sentence, _draw(found, splits), table)


def _read(study: Study, out: Path, arm: str) -> Worths:
    worths: Worths = {}
    for run in runs_of(study, arm=arm, out=out):
        for split, losses in read_caption_losses(run.folder).items():
            worths.setdefault(split, {})[run.seed] = losses
    return worths


def _worth(seeds: dict[int, CaptionLosses]) -> str:
    values = [one.worth for one in seeds.values()]
    if not values:
        return "-"
    return f"{np.mean(values):.4f}" + (
        f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    )


def _draw(found: dict[str, Worths], splits: list[str]) -> Figure:
    """Draw the worth of captions, a group of points per split, every seed."""
    figure, (axis,) = panels(1)
    figure.set_size_inches(7.4, 1.2 + 0.4 * len(splits))
    axis.axvline(0, color="0.5", linewidth=0.8)
    for index, ((arm, worths), (colour, _)) in enumerate(zip(found.items(), styles(), strict=False)):
        height = [-place - 0.15 * index for place, split in enumerate(splits) for _ in worths.get(split, {})]
        values = [one.worth for split in splits for one in worths.get(split, {}).values()]
        axis.plot(values, height, color=colour, marker="o", linestyle="", markersize=4, label=arm)
    axis.set_yticks([-place for place in range(len(splits))], splits, fontsize=8)
    axis.set(xlabel="worth of a caption, nats per code; every seed")
    finish(axis)
    return figure


SECTIONS = (SectionKind("wordings", reads="perplexity.json of runs", make=wordings),)
