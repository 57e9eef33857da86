"""What captions are worth in the words of training and in others: is the language known, or only the labels?"""

from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from t2i.report.figures import finish, panels, styles
from t2i.report.sections.section import Section, SectionKind, difference, p_value
from t2i.study.measured import CaptionLosses, read_caption_losses, read_cut_captions
from t2i.study.results import Run, runs_of
from t2i.study.spec import Study
from t2i.study.statistics import PairedTest, corrected, paired_test
from t2i.study.words import known_words

Worths = dict[str, dict[int, CaptionLosses]]
"""Held-out split -> seed -> image losses under two captions."""


def wordings(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Tabulate the worth of captions (shuffled - matched) per held-out split, and compare the first two arms."""
    runs = {arm: runs_of(study, arm=arm, out=out) for arm in arms}
    found = {arm: _read(of_arm, "captions") for arm, of_arm in runs.items()}
    labels = {arm: _read(of_arm, "label_captions") for arm, of_arm in runs.items()}
    splits = list(dict.fromkeys(split for worths in found.values() for split in worths))
    if not splits:
        return Section("Wordings", "No run's perplexity.json says what captions are worth.")
    words = known_words(next(run.folder for of_arm in runs.values() for run in of_arm))
    head, columns = ["held-out images", "images"], [splits, [_images(found, split) for split in splits]]
    if words:
        head.append("its words in training captions")
        columns.append([f"{words[split]:.1%}" if split in words else "-" for split in splits])
    for arm in arms:
        head.append(arm)
        columns.append([_worth(found[arm].get(split, {})) for split in splits])
    has_labels = any(labels.values())
    for arm in arms if has_labels else []:
        head.append(f"{arm}, the same images by their usual captions")
        columns.append([_worth(labels[arm].get(split, {})) for split in splits])
    compared = ""
    if len(arms) > 1:
        first, second = arms[:2]
        tests = {split: _test(found[first].get(split, {}), found[second].get(split, {})) for split in splits}
        cells = _cells(tests)
        head += [f"{first} - {second}", "p", "p, corrected", "seeds"]
        columns += [list(column) for column in zip(*cells.values(), strict=True)]
        seen = "; ".join(f"{split} {cells[split][0]}" for split, test in tests.items() if test is not None)
        if seen:
            compared = f" {first} - {second}, p corrected for the number of rows (Holm): {seen}."
    table = [head, *(list(row) for row in zip(*columns, strict=True))]
    sentence = (
        "What a caption is worth: image loss under a shuffled caption minus under the matched one, in nats per code."
        " Words that training captions have may have been learned there. A gain by other words speaks for a language"
        f" known before, as far as these share no tokens with those. {_of_other_images(has_labels)}{compared}"
        f"{_not_read_yet(found, labels)}{_truncated([run for of_arm in runs.values() for run in of_arm])}"
    )
    return Section("Wordings", sentence, _draw(found, splits), table)


def _of_other_images(has_labels: bool) -> str:
    if has_labels:
        return (
            "Rows are of different images: a worth compares with that of the usual captions in its own row."
        )
    return "Rows are of different images, so that they do not compare with one another."


def _not_read_yet(found: dict[str, Worths], labels: dict[str, Worths]) -> str:
    """Say to which arms captions in the words of training are not shown to be worth anything; empty for none."""
    arms = []
    for arm, worths in found.items():
        usual = {
            split: seeds for split, seeds in worths.items() if split not in labels[arm] and len(seeds) > 1
        }
        tests = {split: _test_of_any(list(seeds.values())) for split, seeds in usual.items()}
        if tests and all(test.verdict != "higher" for test in tests.values()):
            seen = (f"{split} {difference(test.mean, test.low, test.high)}" for split, test in tests.items())
            arms.append(f"{arm} ({', '.join(seen)})")
    if not arms:
        return ""
    return (
        f" Not even in the words of training are captions shown to be worth anything to {' and '.join(arms)}:"
        " before they are, other words cannot tell much."
    )


def _test_of_any(seeds: list[CaptionLosses]) -> PairedTest:
    """Test whether captions are worth anything, over seeds."""
    return paired_test([one.worth for one in seeds], [0.0] * len(seeds))


def _truncated(runs: list[Run]) -> str:
    """Say in which splits the ends of captions were not read; empty for none."""
    cut: dict[str, int] = {}
    for run in runs:
        cut |= read_cut_captions(run.folder)
    if not cut:
        return ""
    said = ", ".join(f"{count:,} in {split}" for split, count in cut.items())
    return f" Sequences had no room for the ends of some captions: {said}."


def _read(runs: list[Run], kind: Literal["captions", "label_captions"]) -> Worths:
    worths: Worths = {}
    for run in runs:
        for split, losses in read_caption_losses(run.folder, kind=kind).items():
            worths.setdefault(split, {})[run.seed] = losses
    return worths


def _images(found: dict[str, Worths], split: str) -> str:
    """Count the images of a split, which all runs have measured alike."""
    return f"{next(iter(next(one[split] for one in found.values() if split in one).values())).num_pictures:,}"


def _test(first: dict[int, CaptionLosses], second: dict[int, CaptionLosses]) -> PairedTest | None:
    """Test the worth of captions to two arms; None without a seed in common."""
    seeds = sorted(first.keys() & second.keys())
    return paired_test(*([one[seed].worth for seed in seeds] for one in (first, second))) if seeds else None


def _cells(tests: dict[str, PairedTest | None]) -> dict[str, list[str]]:
    """Write each split's difference, p, corrected p and number of seeds."""
    known = {split: test for split, test in tests.items() if test is not None}
    holm = dict(zip(known, corrected([test.p_value for test in known.values()]), strict=True))
    return {
        split: ["no seed in common", "", "", "0"]
        if test is None
        else [
            difference(test.mean, test.low, test.high),
            p_value(test.p_value),
            p_value(holm[split]),
            str(test.num_seeds),
        ]
        for split, test in tests.items()
    }


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


SECTIONS = (
    SectionKind("wordings", reads="perplexity.json of runs, captions of their shards", make=wordings),
)
