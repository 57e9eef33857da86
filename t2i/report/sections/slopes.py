"""Is pre-training worth more where codes are more like text? A line through image tokenizers, seed by seed."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from t2i.errors import UserError
from t2i.report.figures import COLOURS, MARKERS, panels
from t2i.report.sections.overviews import BASELINES, gap_of
from t2i.report.sections.section import Section, SectionKind, in_folder, interval, p_value
from t2i.study.measured import read_alignment
from t2i.study.results import image_baselines, runs_of
from t2i.study.spec import Study, nearest_name
from t2i.study.statistics import PairedTest, corrected, paired_test

FEWEST = 3
"""Image tokenizers of a line: two of them lie on one whatever they are."""


@dataclass(frozen=True)
class Codes:
    """What is known of the codes of one image tokenizer."""

    retrieval: float
    """Share of held-out images that find their caption by the codes, divided by chance; of two spaces of embeddings
    the larger."""
    retrieval_error: float
    """Its standard error over images; the alignment is trained once."""
    entropy: float
    """Nats per held-out code when codes are counted."""
    saved: float
    """Nats per held-out code that the code before saves: how compressible they are."""


LIKENESSES: dict[str, Callable[[Codes], float]] = {
    "retrieval, times chance": lambda codes: codes.retrieval,
    "entropy, nats": lambda codes: codes.entropy,
    "saved by the code before, nats": lambda codes: codes.saved,
}
"""In what codes may be like text, and how much they are."""


def slope(
    study: Study,
    out: Path,
    *,
    pairs: dict[str, tuple[str, str]],
    alignments: dict[str, str],
    relative_to: str = "uniform",
) -> Section:
    """Fit a line to what pre-training is worth against how like text codes are; its slope is tested over seeds.

    Args:
        pairs: an image tokenizer's name -> its pre-trained and its random arm.
        alignments: the same names -> the folder of an alignment to its codes, which has retrieval.
        relative_to: the count-based baseline that worth is a share beyond, as in `overview`.
    """
    gaps = {
        name: gap
        for name, arms in pairs.items()
        if (gap := gap_of(study, out, arms, value="image_loss", relative_to=relative_to)) and gap.differences
    }
    codes = {name: one for name in gaps if (one := _codes(study, out, pairs[name][0], alignments[name]))}
    seeds = sorted(set.intersection(*(set(gaps[name].differences) for name in codes))) if codes else []
    if len(codes) < FEWEST or not seeds:
        return Section(
            "A line",
            f"{len(codes)} image tokenizers have finished runs that learned something beyond the {relative_to} cost,"
            f" and an alignment; a line takes {FEWEST}.",
        )
    # Lower losses are better, so what the pre-trained arm is below the random one is its worth.
    worths = np.array(
        [[-gaps[name].differences[seed] for name in codes] for seed in seeds]
    )  # (seeds, tokenizers)
    amounts = {name: np.array([of(one) for one in codes.values()]) for name, of in LIKENESSES.items()}
    tests = {name: _tested(amount, worths) for name, amount in amounts.items() if np.ptp(amount) > 0}
    table = [["image tokenizer", *LIKENESSES, "error of retrieval", f"worth, share beyond {relative_to}"]]
    for place, (name, one) in enumerate(codes.items()):
        worth = worths[:, place]
        table.append(
            [name, *(f"{of(one):.3f}" for of in LIKENESSES.values())]
            + [
                f"{one.retrieval_error:.3f}",
                f"{worth.mean():+.4f} ({worth.min():+.4f} to {worth.max():+.4f})",
            ]
        )
    return Section(
        "A line",
        _in_words(tests, num_codes=len(codes), seeds=seeds, relative_to=relative_to)
        + "".join(dict.fromkeys(gaps[name].early for name in codes)),
        _draw(amounts, worths, list(codes), label=f"worth, share beyond {relative_to}"),
        table,
    )


def _codes(study: Study, out: Path, arm: str, folder: str) -> Codes | None:
    """Read what is known of the codes that an arm was trained on; None before the alignment has ended."""
    sides = read_alignment(in_folder(folder, out))
    costs = image_baselines(runs_of(study, arm=arm, out=out))
    if not sides or not {"unigram", "bigram"} <= costs.keys():
        return None
    best = max(sides.values(), key=lambda one: one.times_chance)
    return Codes(
        best.times_chance, best.times_chance_error, costs["unigram"], costs["unigram"] - costs["bigram"]
    )


def _tested(amount: np.ndarray, worths: np.ndarray) -> PairedTest:
    """Test the least-squares slopes of seeds against 0."""
    centred = amount - amount.mean()
    slopes = worths @ centred / (centred @ centred)
    return paired_test(slopes.tolist(), [0.0] * len(slopes))


def _in_words(tests: dict[str, PairedTest], *, num_codes: int, seeds: list[int], relative_to: str) -> str:
    if not tests:
        return "In nothing do the codes of these image tokenizers differ, so that no line is fitted."
    holm = dict(zip(tests, corrected([test.p_value for test in tests.values()]), strict=True))
    said = [
        f"per unit of {name} {test.mean:+.4f} {interval(test.low, test.high, '{:+.4f}')}, p = {p_value(test.p_value)},"
        f" corrected {p_value(holm[name])}"
        for name, test in tests.items()
    ]
    return (
        f"Least-squares slopes of worth through {num_codes} image tokenizers, one for each of {len(seeds)} seeds"
        f" ({', '.join(map(str, seeds))}) and tested against 0, corrected for their number (Holm): {'; '.join(said)}."
        " Intervals are over seeds of training; that other image tokenizers of these kinds would give other slopes is"
        " in none of them, and with so few of them the slopes are not of independent causes. Retrieval is measured"
        f" once, with the error that the table states, which draws its slope towards 0. Worth is a share beyond the"
        f" {relative_to} cost, and how much is left to learn beyond it depends on the codes' entropy too: a slope along"
        " entropy is partly arithmetic."
    )


def _draw(amounts: dict[str, np.ndarray], worths: np.ndarray, names: list[str], *, label: str) -> Figure:
    """Draw worth against each likeness: seeds as dots, and the line through their means."""
    figure, axes = panels(len(amounts))
    for place, (axis, (name, amount)) in enumerate(zip(axes, amounts.items(), strict=True)):
        mean = worths.mean(0)
        if np.ptp(amount) > 0:
            ends = np.array([amount.min(), amount.max()])
            axis.plot(ends, np.polyval(np.polyfit(amount, mean, 1), ends), color="0.5", linewidth=0.9)
        for one, x, y, seeds, colour, marker in zip(
            names, amount, mean, worths.T, cycle(COLOURS), cycle(MARKERS), strict=False
        ):
            axis.plot(
                [x] * len(seeds), seeds, color=colour, marker="o", markersize=3, linestyle="", alpha=0.4
            )
            axis.plot(x, y, color=colour, marker=marker, markersize=6, linestyle="", label=one)
        axis.set(xlabel=name, ylabel="" if place else label)
        axis.grid(alpha=0.2)
    # Above and not beside the points, where long names would lie over other panels.
    figure.set_size_inches(figure.get_figwidth(), 3.2 + 0.17 * len(names))
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, fontsize=8, frameon=False)
    return figure


def _check_names(
    _study: Study,
    *,
    pairs: dict[str, tuple[str, str]],
    alignments: dict[str, str],
    relative_to: str = "uniform",
) -> None:
    if len(pairs) < FEWEST:
        raise UserError(f"slope: pairs has {len(pairs)} image tokenizers; a line takes {FEWEST}.")
    if relative_to not in BASELINES:
        raise UserError(f"slope: relative_to is {relative_to}; {nearest_name(relative_to, list(BASELINES))}.")
    if missing := [name for name in pairs if name not in alignments]:
        raise UserError(f"slope: alignments has no folder for {missing[0]}, which is in pairs.")


SECTIONS = (
    SectionKind(
        "slope",
        reads="metrics.jsonl and data_manifest.json of runs, align.json of alignments",
        make=slope,
        check=_check_names,
    ),
)
