"""Comparisons of two arms: the paired difference, its test at the end, sizes of data."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from t2i.report.figures import COLOURS, LABELS, draw_baselines, draw_mean_and_range, finish, panels, styles
from t2i.report.sections.section import (
    Section,
    SectionKind,
    difference,
    interval,
    known,
    p_value,
    verdict_on,
)
from t2i.study.results import (
    Curve,
    Run,
    curve,
    image_baselines,
    is_rate_falling,
    num_samples,
    of_common_seeds,
    paired,
    runs_of,
)
from t2i.study.spec import Study
from t2i.study.statistics import (
    DifferenceCurve,
    PairedTest,
    Worth,
    difference_curve,
    paired_test,
    worth_in_tokens,
)


@dataclass(frozen=True)
class Pair:
    """Two arms side by side."""

    runs: list[list[Run]]
    """Finished runs of each."""
    whole: tuple[Curve, Curve]
    """Over the seeds that both have, and all steps of each."""
    common: tuple[Curve, Curve]
    """Over the steps that both have."""


def comparison(
    study: Study, out: Path, *, arms: tuple[str, str], value: str, split: str = "heldout"
) -> Section:
    """Compare two arms: the paired difference during training, the test at its end, the gain in tokens."""
    first_name, second_name = arms
    pair = pair_of(study, out, arms, value=value, split=split)
    if pair is None:
        return Section(
            "Comparison", f"{' and '.join(arms)} have no finished runs of one seed with {split} {value}."
        )
    first, second = pair.common
    test = test_at_end(first, second)
    until = int(first.values.mean(0).argmin()) + 1  # a loss that rises again is no target to reach
    reaching = pair.whole[1]  # the second arm may have gone on after the last step of the first
    worth = worth_in_tokens(
        first.values,
        reaching.values,
        first_tokens=first.tokens,
        second_tokens=reaching.tokens,
        at=range(until),
    )
    baselines = image_baselines(pair.runs[0]) if value == "image_loss" else {}
    figure = _draw_difference(
        (first, second),
        difference_curve(first.values, second.values),
        worth,
        names=(first_name, second_name),
        value=value,
        baselines=baselines,
    )
    head = [
        "at tokens",
        f"{value} of {first_name}",
        f"extra tokens {second_name} needs",
        "factor",
        "seeds that reach it",
    ]
    table = [head, *(_worth_row(one, num_seeds=test.num_seeds) for one in worth)]
    sentence = _found(first, second, names=(first_name, second_name), unigram=baselines.get("unigram"))
    sentence += said_early(pair, arms)
    if until > 1 and any(is_rate_falling(of_arm) for of_arm in pair.runs):
        sentence += (
            " The worth in tokens reads losses before the end of training, where the learning rate still falls"
            " (train.min_lr_ratio < 1): runs of those lengths would end lower."
        )
    return Section("Comparison", sentence, figure, table)


def _worth_row(one: Worth, *, num_seeds: int) -> list[str]:
    if one.is_earlier:
        extra = "reached before the first measurement"
    elif math.isnan(one.extra_tokens):
        extra = "not reached"
    else:
        extra = f"{one.extra_tokens:,.0f} {interval(one.low, one.high, '{:,.0f}')}"
    factor = "" if math.isnan(one.factor) else f"{one.factor:.2f}"
    return [
        f"{one.first_tokens:,}",
        f"{one.loss:.4f}",
        extra,
        factor,
        f"{one.num_reached} of {num_seeds}",
    ]


def _found(first: Curve, second: Curve, *, names: tuple[str, str], unigram: float | None) -> str:
    """Describe the test of two arms, where a loss rose again, and whether an arm beats the unigram baseline.

    Args:
        unigram: the count-based baseline, in nats per code; None for a value that has none.
    """
    test = test_at_end(first, second)
    at = f"{first.tokens[-1]:,}"
    if second.tokens[-1] != first.tokens[-1]:  # such as where one of them has text beside its images
        at += f" and {second.tokens[-1]:,}"
    sentence = (
        f"At {at} tokens, step {first.steps[-1]}, {names[0]} - {names[1]} is {test.mean:+.4f} nats"
        f" {interval(test.low, test.high, '{:+.4f}')}, paired t-test over {test.num_seeds} seeds:"
        f" p = {p_value(test.p_value)},"
        f" {verdict_on(test.verdict, names[0])}. The smallest difference that so many seeds detect with 80% power"
        f" is {known(test.smallest_detectable)} nats."
    )
    rises = _rise(first, names[0]) + _rise(second, names[1])
    if rises:
        sentence += f"{rises} At each run's lowest, {_lowest_difference(first, second)}."
    # Above the codes' frequencies nothing was learned about images, so a difference is one of warming up.
    if unigram and min(first.values[:, -1].mean(), second.values[:, -1].mean()) > unigram:
        why = "what was learned does not hold for held-out images" if rises else "images are not learned yet"
        sentence += f" Neither arm is below the unigram baseline ({unigram:.3f}): {why}."
    return sentence


def sizes(
    study: Study,
    out: Path,
    *,
    pairs: list[tuple[str, str]],
    names: tuple[str, str],
    value: str = "image_loss",
) -> Section:
    """Compare pairs of arms that were trained on different amounts of data: the difference against the size.

    Args:
        pairs: first and second arm of each size.
        names: what the first arms are, and the second.
    """
    heads = ["training samples", "arms", *names, "difference", "p", "verdict", "at each run's lowest"]
    table, early = [heads], ""
    found: list[tuple[int, PairedTest]] = []
    for arms in pairs:
        pair = pair_of(study, out, arms, value=value)
        if pair is None:
            continue
        first, second = pair.common
        early += said_early(pair, arms)
        test = test_at_end(first, second)
        found.append((num_samples(pair.runs[0][0]), test))
        gap = difference(test.mean, test.low, test.high)
        means = [f"{one.values[:, -1].mean():.4f}" for one in (first, second)]
        verdict = verdict_on(test.verdict, names[0])
        lowest = _lowest_difference(first, second)
        table.append(
            [f"{found[-1][0]:,}", ", ".join(arms), *means, gap, p_value(test.p_value), verdict, lowest]
        )
    if not found:
        return Section("Data sizes", "No pair of arms is finished.")
    sentence = "; ".join(f"{test.mean:+.4f} nats with {count:,} samples" for count, test in found)
    figure = _draw_sizes(
        [count for count, _ in found],
        [test for _, test in found],
        names=names,
        value=value,
    )
    return Section("Data sizes", f"{names[0]} - {names[1]}: {sentence}.{early}", figure, table)


def pair_of(
    study: Study, out: Path, arms: tuple[str, str], *, value: str, split: str = "heldout"
) -> Pair | None:
    """Read two arms; None without finished runs of a common seed with common steps."""
    runs = [runs_of(study, arm=arm, out=out) for arm in arms]
    whole = of_common_seeds(*(curve(one, value=value, split=split) for one in runs))
    common = paired(*whole) if whole else None
    return Pair(runs, whole, common) if whole and common else None


def said_early(pair: Pair, arms: tuple[str, str]) -> str:
    """Say which of two arms is read before its end, because the other has fewer steps; empty for neither."""
    said = ""
    for name, of_arm, whole, common in zip(arms, pair.runs, pair.whole, pair.common, strict=True):
        if whole.steps[-1] > common.steps[-1]:
            said += f" {name} is read at step {common.steps[-1]:,} of {whole.steps[-1]:,}, the last that both have"
            if is_rate_falling(of_arm):
                said += (
                    ", where its learning rate still falls (train.min_lr_ratio < 1): a run of that length would end"
                    " lower"
                )
            said += "."
    return said


def test_at_end(first: Curve, second: Curve) -> PairedTest:
    """Test the difference of two arms at their last common step."""
    return paired_test(first.values[:, -1].tolist(), second.values[:, -1].tolist())


def _rise(one: Curve, name: str) -> str:
    """Say where a held-out loss was lowest, if it ends higher in every seed; otherwise nothing."""
    lowest = int(one.values.mean(0).argmin())
    # In every seed: the mean of noisy curves nearly always ends a little above its lowest point.
    if not (one.values[:, -1] > one.values[:, lowest]).all():
        return ""
    least, end = one.values[:, lowest].mean(), one.values[:, -1].mean()
    return f" {name} was lowest at {one.tokens[lowest]:,} tokens, {least:.3f}, and rose to {end:.3f}."


def _lowest_difference(first: Curve, second: Curve) -> str:
    """Compare the lowest loss of each run, as early stopping would keep it, chosen on the same held-out samples."""
    test = paired_test(first.values.min(1).tolist(), second.values.min(1).tolist())
    return f"{difference(test.mean, test.low, test.high)}, p = {p_value(test.p_value)}"


def _draw_difference(
    both: tuple[Curve, Curve],
    found: DifferenceCurve,
    worth: list[Worth],
    *,
    names: tuple[str, str],
    value: str,
    baselines: dict[str, float],
) -> Figure:
    """Draw both arms beside baselines, the paired difference with its interval, and the gain in tokens."""
    figure, (both_axis, left, right) = panels(3)
    first = both[0]
    for one, name, (colour, dash) in zip(both, names, styles(), strict=False):
        draw_mean_and_range(both_axis, one, colour=colour, dash=dash, label=name)
    draw_baselines(both_axis, baselines)
    both_axis.set(xlabel="tokens trained on", ylabel=f"held-out {LABELS.get(value, value)}")
    left.axhline(0, color="0.5", linewidth=0.8)
    left.plot(first.tokens, found.mean, color=COLOURS[0], marker="o", markersize=3, label="mean over seeds")
    if not np.isnan(found.low).all():
        left.fill_between(
            first.tokens, found.low, found.high, color=COLOURS[0], alpha=0.2, label="95% interval"
        )
    left.set(xlabel="tokens trained on", ylabel=f"{LABELS.get(value, value)}\n{names[0]} - {names[1]}")
    # A loss that is not reached has no number to draw; the table says so.
    reached = [one for one in worth if not math.isnan(one.extra_tokens)]
    right.axhline(0, color="0.5", linewidth=0.8)
    if reached:
        low, high = ([getattr(one, side) for one in reached] for side in ("low", "high"))
        at, mean = [one.first_tokens for one in reached], [one.extra_tokens for one in reached]
        right.plot(at, mean, color=COLOURS[1], marker="o", markersize=3, label="mean over seeds")
        if not np.isnan(low).all():
            right.fill_between(at, low, high, color=COLOURS[1], alpha=0.2, label="95% interval")
    else:
        said = f"not reached by {names[1]}"
        if any(one.is_earlier for one in worth):
            said = f"reached by {names[1]}\nbefore the first measurement"
        right.text(0.5, 0.5, said, transform=right.transAxes, ha="center", va="bottom")
        right.set_yticks([])
    right.set_xlim(left.get_xlim())  # so that one place across is one moment of training in both
    right.set(xlabel=f"tokens that {names[0]} was trained on", ylabel=f"extra tokens\nthat {names[1]} needs")
    for axis, tokens in ((both_axis, "x"), (left, "x"), (right, "xy")):
        finish(axis, tokens=tokens)
    return figure


def _draw_sizes(samples: list[int], tests: list[PairedTest], *, names: tuple[str, str], value: str) -> Figure:
    """Draw the paired difference at the end against the number of training samples, with its interval."""
    figure, (axis,) = panels(1)
    axis.axhline(0, color="0.5", linewidth=0.8)
    means = [test.mean for test in tests]
    reach = [0.0 if math.isnan(test.low) else test.mean - test.low for test in tests]
    axis.errorbar(
        samples, means, yerr=reach, color=COLOURS[0], marker="o", capsize=3, label="mean, 95% interval"
    )
    axis.set_xscale("log", base=2)  # sizes are fractions of one data set, each a power of two or so apart
    axis.set_xticks(samples, [f"{count:,}" for count in samples])
    axis.set(xlabel="training samples", ylabel=f"{LABELS.get(value, value)}\n{names[0]} - {names[1]}")
    finish(axis)
    return figure


SECTIONS = (
    SectionKind("comparison", reads="metrics.jsonl of runs", make=comparison),
    SectionKind("sizes", reads="metrics.jsonl and data_manifest.json of runs", make=sizes),
)
