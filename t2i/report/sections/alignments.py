"""Contrastive alignments: how often an image finds its caption, and by which codes more often."""

import math
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

from t2i.report.figures import finish, panels, styles
from t2i.report.sections.section import Section, SectionKind, files_in, interval, p_value
from t2i.runs.metrics_log import read_metrics
from t2i.study.hits import HitComparison, compare_hits
from t2i.study.measured import Retrieval, read_alignment, read_each, read_hits
from t2i.study.spec import Study
from t2i.study.statistics import corrected


def alignment(study: Study, out: Path, *, folder: str | dict[str, str]) -> Section:
    """Draw the contrastive alignment's loss and temperature; the table has retrieval beside chance (Figure 7).

    Args:
        folder: of the alignment; or what each is called -> its folder, and then each is compared with the first.
    """
    folders = files_in({"": folder} if isinstance(folder, str) else folder, out)
    found = read_each(folders, read_alignment)
    if not found:
        places = " and ".join(map(str, folders.values()))
        return Section("Alignment", f"{places} holds no finished alignment.")
    table = [
        ["embeddings", "image to caption", "caption to image", "chance", "held-out pairs", "temperature"]
    ]
    for name, sides in found.items():
        for side, one in sides.items():
            shares = [f"{share:.2%}" for share in (one.image_to_text, one.text_to_image, one.chance)]
            table.append([_label(name, side), *shares, str(one.num_pairs), f"{one.temperature:.4f}"])
    sentence = "Among held-out pairs, an image retrieves its caption at most " + ", ".join(
        f"{_best(sides):.1f} times as often as by chance" + (f" ({name})" if name else "")
        for name, sides in found.items()
    )
    counts = {name: max(one.num_styles for one in sides.values()) for name, sides in found.items()}
    # Found among all and found within a style are not the same.
    alike = [name for name in found if counts[name] == counts[next(iter(found))]]
    sentence += f"{_styles_in_words(counts)}." + _compared(
        {name: folders[name] for name in alike}, others=[name for name in found if name not in alike]
    )
    return Section(
        "Alignment", sentence, _draw({name: (folders[name], [*found[name]]) for name in found}), table
    )


def _label(name: str, side: str) -> str:
    return f"{name} ({side})" if name else side


def _best(sides: dict[str, Retrieval]) -> float:
    return max(one.times_chance for one in sides.values())


def _styles_in_words(counts: dict[str, int]) -> str:
    """Say among which pairs a caption is looked for, where these are not all."""
    several = sorted(set(counts.values()))
    return (
        ""
        if several == [1]
        else f", each among those of its own style ({' or '.join(map(str, several))} styles)"
    )


def _compared(folders: dict[str, Path], *, others: list[str]) -> str:
    """Compare every alignment with the first, image by image; empty for one.

    Args:
        others: alignments that were measured by another rule, which are named alone.
    """
    hits = {name: read_hits(folder) for name, folder in folders.items()}
    first, *rest = folders
    tests: dict[tuple[str, str], HitComparison] = {}
    for name, side in product(rest, hits[first]):
        if found := compare_hits(hits[first][side], hits[name].get(side, {})):
            tests[name, side] = found
    missing = [*(name for name in rest if not any(name == of for of, _ in tests)), *others]
    holm = corrected([test.p_value for test in tests.values()])
    said = "".join(
        f" By {_label(name, side)}, an image finds its caption {_times(test)} times as often as by"
        f" {_label(first, side)}: of {test.num_images} images, {test.only_second} are found better and"
        f" {test.only_first} worse, McNemar's p = {p_value(p)}."
        for ((name, side), test), p in zip(tests.items(), holm, strict=True)
    )
    if len(tests) > 1:
        said += f" These {len(tests)} are corrected for their number (Holm)."
    if tests:
        said += (
            " Intervals and tests are over images, each counted as independent: where several show one thing,"
            " intervals are too narrow and p too small. What another training of a tokenizer would give is in neither."
        )
    if missing:
        said += (
            f" {', '.join(missing)} and {first} are not compared image by image: they have no hits.json of the same"
            " held-out images, looked for among the same."
        )
    return said


def _times(test: HitComparison) -> str:
    if math.isnan(test.ratio):
        return "an unknown number of"
    return f"{test.ratio:.2f} {interval(test.low, test.high, '{:.2f}')}"


def _draw(found: dict[str, tuple[Path, list[str]]]) -> Figure:
    """Draw contrastive loss and temperature against steps (paper, Figure 7).

    Args:
        found: what each alignment is called -> its folder, and its spaces of embeddings.
    """
    figure, axes = panels(2)
    lines = [
        (
            _label(name, side),
            [row for row in read_metrics(folder) if "split" not in row and row["rows"] == side],
        )
        for name, (folder, sides) in found.items()
        for side in sides
    ]
    for axis, value in zip(axes, ("loss", "temperature"), strict=True):
        for (label, rows), (colour, dash) in zip(lines, styles(), strict=False):
            points = [(row["step"], row[value]) for row in rows]
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=dash, label=label)
        axis.set(xlabel="step", ylabel="contrastive loss, nats" if value == "loss" else value)
        finish(axis)
    return figure


SECTIONS = (
    SectionKind("alignment", reads="align.json, hits.json and metrics.jsonl of alignments", make=alignment),
)
