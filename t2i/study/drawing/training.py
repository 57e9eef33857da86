"""Training curves, paired differences, data sizes."""

import math
from typing import Any

import numpy as np

from t2i.report.figures import COLOURS, LABELS, draw_floors, finish, panels, styles
from t2i.study.results import Curve
from t2i.study.statistics import DifferenceCurve, PairedTest, Worth, ema


def training_curves(
    values: dict[str, dict[str, Curve]], *, decay: float, perplexity: bool, floors: dict[str, float]
) -> Any:
    """Draw each value's panel: every seed raw and pale, the mean of smoothed seeds on top."""
    figure, axes = panels(len(values))
    for axis, (value, arms) in zip(axes, values.items(), strict=True):
        for (arm, one), (colour, dash) in zip(arms.items(), styles(), strict=False):
            smoothed = np.array([ema(row.tolist(), decay=decay) for row in one.values])
            shown = [np.exp(each) if perplexity else each for each in (one.values, smoothed.mean(0))]
            for row in shown[0]:
                axis.plot(one.tokens, row, color=colour, alpha=0.25, linewidth=0.5)
            count = len(one.seeds)
            label = f"{arm} ({count} seed{'s' if count > 1 else ''})"
            axis.plot(one.tokens, shown[1], color=colour, linestyle=dash, label=label)
        if value == "image_loss":
            draw_floors(axis, floors, perplexity=perplexity)
        label = LABELS.get(value, value)
        if perplexity:
            label = label.split(",")[0].replace("loss", "perplexity")
        axis.set(xlabel="tokens trained on", ylabel=label)
        if perplexity:
            axis.set_yscale("log")
        finish(axis)
    return figure


def difference(
    both: tuple[Curve, Curve],
    found: DifferenceCurve,
    worth: list[Worth],
    *,
    names: tuple[str, str],
    value: str,
    floors: dict[str, float],
) -> Any:
    """Draw both arms beside floors, the paired difference with its interval, and the worth in tokens."""
    figure, (both_axis, left, right) = panels(3)
    first = both[0]
    for one, name, (colour, dash) in zip(both, names, styles(), strict=False):
        both_axis.plot(one.tokens, one.values.mean(0), color=colour, linestyle=dash, label=name)
        both_axis.fill_between(one.tokens, one.values.min(0), one.values.max(0), color=colour, alpha=0.15)
    draw_floors(both_axis, floors)
    both_axis.set(xlabel="tokens trained on", ylabel=f"held-out {LABELS.get(value, value)}")
    left.axhline(0, color="0.5", linewidth=0.8)
    left.plot(first.tokens, found.mean, color=COLOURS[0], marker="o", markersize=3, label="mean over seeds")
    if not np.isnan(found.low).all():
        left.fill_between(
            first.tokens, found.low, found.high, color=COLOURS[0], alpha=0.2, label="95% interval"
        )
    left.set(xlabel="tokens trained on", ylabel=f"{LABELS.get(value, value)}\n{names[0]} - {names[1]}")
    reached = [one for one in worth if not math.isnan(one.extra_tokens)]
    right.axhline(0, color="0.5", linewidth=0.8)
    if reached:
        low, high = ([getattr(one, side) for one in reached] for side in ("low", "high"))
        at, mean = [one.first_tokens for one in reached], [one.extra_tokens for one in reached]
        right.plot(at, mean, color=COLOURS[1], marker="o", markersize=3, label="mean over seeds")
        if not np.isnan(low).all():
            right.fill_between(at, low, high, color=COLOURS[1], alpha=0.2, label="95% interval")
    else:
        right.text(
            0.5, 0.5, f"{names[1]} does not get there", transform=right.transAxes, ha="center", va="bottom"
        )
    right.set_xlim(left.get_xlim())
    right.set(xlabel=f"tokens that {names[0]} was trained on", ylabel=f"tokens {names[1]} needs beyond")
    for axis in (both_axis, left, right):
        finish(axis)
    return figure


def overview(tests: dict[str, PairedTest], *, value: str) -> Any:
    """Draw each test's mean difference with its interval, a line a comparison, the first on top."""
    figure, (axis,) = panels(1)
    figure.set_size_inches(7.4, 1.0 + 0.32 * len(tests))
    axis.axvline(0, color="0.5", linewidth=0.8)
    for place, test in enumerate(tests.values()):
        reach = 0.0 if math.isnan(test.low) else test.mean - test.low
        axis.errorbar(test.mean, -place, xerr=reach, color=COLOURS[0], marker="o", markersize=4, capsize=3)
    axis.set_yticks([-place for place in range(len(tests))], list(tests), fontsize=8)
    axis.set(xlabel=f"difference of {LABELS.get(value, value)}; mean, 95% interval of each alone")
    finish(axis)
    return figure


def sizes(samples: list[int], tests: list[PairedTest], *, names: tuple[str, str], value: str) -> Any:
    """Draw the paired difference at the end against the number of training samples, with its interval."""
    figure, (axis,) = panels(1)
    axis.axhline(0, color="0.5", linewidth=0.8)
    means = [test.mean for test in tests]
    reach = [0.0 if math.isnan(test.low) else test.mean - test.low for test in tests]
    axis.errorbar(
        samples, means, yerr=reach, color=COLOURS[0], marker="o", capsize=3, label="mean, 95% interval"
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(samples, [f"{count:,}" for count in samples])
    axis.set(xlabel="training samples", ylabel=f"{LABELS.get(value, value)}\n{names[0]} - {names[1]}")
    finish(axis)
    return figure
