"""Figures of a study: matplotlib figures out of curves; colour-blind safe, lines apart in print by their dashes."""

import math
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from t2i.runs.folder import read_metrics
from t2i.study.arms import Curve
from t2i.study.figures import COLOURS
from t2i.study.statistics import DifferenceCurve, Worth, ema

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
LABELS = {
    "loss": "loss, nats a token",
    "text_loss": "text loss, nats a token",
    "image_loss": "image loss, nats a code",
    "text_loss_text_rows": "held-out text among text rows,\nnats a token",
    "leaked": "probability that leaks from text",
}


def training_curves(
    panels: dict[str, dict[str, Curve]], *, decay: float, perplexity: bool, floors: dict[str, float]
) -> Any:
    """Draw each value's panel: every seed raw and pale, the mean of smoothed seeds on top."""
    figure, axes = _panels(len(panels))
    for axis, (value, arms) in zip(axes, panels.items(), strict=True):
        for (arm, one), (colour, dash) in zip(arms.items(), _styles(), strict=False):
            smoothed = np.array([ema(row.tolist(), decay=decay) for row in one.values])
            shown = [np.exp(each) if perplexity else each for each in (one.values, smoothed.mean(0))]
            for row in shown[0]:
                axis.plot(one.tokens, row, color=colour, alpha=0.25, linewidth=0.5)
            axis.plot(
                one.tokens, shown[1], color=colour, linestyle=dash, label=f"{arm} ({len(one.seeds)} seeds)"
            )
        if value == "image_loss":
            for share, (name, floor) in zip(cycle((0.01, 0.25)), floors.items(), strict=False):
                level = math.exp(floor) if perplexity else floor
                axis.axhline(level, color="0.6", linewidth=0.7, linestyle=":")
                place = axis.get_yaxis_transform()  # across by share of the axis, up by value
                axis.text(share, level, name, transform=place, fontsize=6, color="0.4", va="bottom")
        label = LABELS.get(value, value)
        if perplexity:
            label = label.split(",")[0].replace("loss", "perplexity")
        axis.set(xlabel="tokens trained on", ylabel=label)
        if perplexity:
            axis.set_yscale("log")
        _finish(axis)
    return figure


def difference(
    first: Curve, found: DifferenceCurve, worth: list[Worth], *, names: tuple[str, str], value: str
) -> Any:
    """Draw the paired difference with its interval, and beside it the worth in tokens."""
    figure, (left, right) = _panels(2)
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
        right.set_xlim(0, first.tokens[-1])
    right.set(xlabel=f"tokens that {names[0]} was trained on", ylabel=f"tokens {names[1]} needs beyond")
    for axis in (left, right):
        _finish(axis)
    return figure


def alignment_curves(folder: Path, sides: list[str]) -> Any:
    """Draw contrastive loss and temperature against steps (paper, Figure 7)."""
    figure, axes = _panels(2)
    rows = [row for row in read_metrics(folder) if "split" not in row]
    for axis, value in zip(axes, ("loss", "temperature"), strict=True):
        for side, (colour, dash) in zip(sides, _styles(), strict=False):
            points = [(row["step"], row[value]) for row in rows if row["rows"] == side]
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=dash, label=side)
        axis.set(xlabel="step", ylabel="contrastive loss, nats" if value == "loss" else value)
        _finish(axis)
    return figure


def cosines(found: dict[str, dict[str, Any]]) -> Any:
    """Draw, a panel a model, how near image, random and text rows are to their nearest text row."""
    figure, axes = _panels(len(found))
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        every = np.concatenate([one["cosines"][kind] for kind in ("image", "random", "text")])
        bins = np.linspace(every.min(), every.max(), 50)
        for kind, (colour, dash) in zip(("image", "random", "text"), _styles(), strict=False):
            axis.hist(
                one["cosines"][kind],
                bins=bins,
                density=True,
                histtype="step",
                color=colour,
                linestyle=dash,
                label=kind,
            )
        axis.set(xlabel="cosine to the nearest text row", ylabel="density", title=name)
        _finish(axis)
    return figure


def forgetting(panels: dict[str, dict[str, Curve]]) -> Any:
    """Draw the cost of held-out text and the leak along training, with the range of seeds."""
    figure, axes = _panels(len(panels))
    for axis, (value, arms) in zip(axes, panels.items(), strict=True):
        for (arm, one), (colour, dash) in zip(arms.items(), _styles(), strict=False):
            axis.plot(
                one.tokens,
                one.values.mean(0),
                color=colour,
                linestyle=dash,
                marker="o",
                markersize=3,
                label=arm,
            )
            axis.fill_between(one.tokens, one.values.min(0), one.values.max(0), color=colour, alpha=0.15)
        axis.set(xlabel="tokens trained on", ylabel=LABELS[value])
        _finish(axis)
    return figure


def _panels(count: int) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, count, figsize=(4.6 * count, 3.4), squeeze=False)
    return figure, axes[0]


def _styles() -> Any:
    return zip(
        cycle(COLOURS), cycle(DASHES), strict=False
    )  # endless on purpose: callers stop at their own last line


def _finish(axis: Any) -> None:
    axis.grid(alpha=0.2)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)
