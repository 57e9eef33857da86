"""Shared parts of figures: panels, line styles, names of values, baselines, SVG."""

import io
import math
from collections.abc import Iterator, Sized
from itertools import cycle

import matplotlib

matplotlib.use("agg")  # before pyplot: there is no screen where reports are written
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from t2i.study.results import TRAIN_ROWS, Curve, Row
from t2i.study.statistics import ema

# Okabe and Ito's palette without its yellow, and wine: colour-blind readers can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
Dash = str | tuple[int, tuple[int, ...]]
DASHES: tuple[Dash, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
"""Six dashes and eight colours: the first 24 lines all differ, and without colour the dashes still do."""
MARKERS = ("s", "^", "D", "v", "P", "X")
LABELS = {
    "loss": "loss, nats per token",
    "text_loss": "text loss, nats per token",
    "image_loss": "image loss, nats per code",
    "text_loss_text_rows": "held-out text, text vocabulary,\nnats per token",
    "leaked": "probability outside\nthe text vocabulary",
}

SPLIT_LABELS = {"heldout": "held-out", "combinations": "known emoji, held-out tones or styles"}
"""Held-out splits, and their names in legends."""


def panels(count: int) -> tuple[Figure, np.ndarray]:
    """Make a row of panels: the figure and its axes, (count,)."""
    figure, axes = plt.subplots(1, count, figsize=(4.2 * count, 3.2), squeeze=False)
    return figure, axes[0]


def styles() -> Iterator[tuple[str, Dash]]:
    """Yield a colour and a dash for each line, without end: callers stop at their own last line."""
    return zip(cycle(COLOURS), cycle(DASHES), strict=False)


def draw_mean_and_range(
    axis: Axes, one: Curve, *, colour: str, dash: Dash, label: str | None, marker: str = ""
) -> None:
    """Draw a curve's mean over seeds, and the range of seeds as a pale band."""
    mean = one.values.mean(0)
    marker = marker or only_point(mean)
    axis.plot(one.tokens, mean, color=colour, linestyle=dash, label=label, marker=marker, markersize=3)
    axis.fill_between(one.tokens, one.values.min(0), one.values.max(0), color=colour, alpha=0.15)


def only_point(values: Sized) -> str:
    """Return the marker of a line that has one point, and would not be seen without; none for others."""
    return "o" if len(values) == 1 else ""


def draw_baselines(axis: Axes, baselines: dict[str, float], *, perplexity: bool = False) -> None:
    """Draw count-based baselines as named horizontal lines."""
    # Names of neighbours stand beside one another: baselines are often so near that they would overlap.
    ordered = sorted(baselines.items(), key=lambda one: one[1])
    for share, (name, baseline) in zip(cycle((0.01, 0.3, 0.6)), ordered, strict=False):
        # A perplexity is the exponential of nats, so its baselines are too.
        level = math.exp(baseline) if perplexity else baseline
        axis.axhline(level, color="0.6", linewidth=0.7, linestyle=":")
        place = axis.get_yaxis_transform()  # across by share of the axis, up by value
        label = axis.text(share, level, name.replace("_", " "), transform=place, fontsize=6, va="bottom")
        label.set(color="0.4", zorder=1.5)  # over raw lines, under their means
        label.set_bbox({"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.3})


def finish(axis: Axes, *, tokens: str = "") -> None:
    """Add a grid and, where lines have names, a legend.

    Args:
        tokens: axes that count tokens, such as "xy"; they are labelled 500k and 2M.
    """
    axis.grid(alpha=0.2)
    for name in tokens:
        {"x": axis.xaxis, "y": axis.yaxis}[name].set_major_formatter(EngFormatter(sep=""))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)


def loss_curves(rows: list[Row], *, kind: str, baselines: dict[str, float]) -> str:
    """Draw training loss, raw and smoothed, and held-out losses of one kind ("image" or "text") as SVG."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    key = f"{kind}_loss"
    if train := _points(rows, key=key, split=TRAIN_ROWS):
        steps, values = zip(*train, strict=True)
        # The raw line stays visible: an average alone hides spikes, which are what one looks for.
        axes.plot(steps, values, color=COLOURS[0], alpha=0.25, linewidth=0.8)
        axes.plot(steps, ema(values), color=COLOURS[0], label="training (EMA, 0.95)")
    for colour, (split, label) in zip(COLOURS[1:], SPLIT_LABELS.items(), strict=False):
        if points := _points(rows, key=key, split=split):
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=label)
    for style, (name, baseline) in zip(("-.", "--", ":", (0, (1, 4))), baselines.items(), strict=False):
        axes.axhline(
            baseline,
            color="0.5",
            linewidth=0.8,
            linestyle=style,
            label=f"{name.replace('_', ' ')}: {baseline:.2f}",
        )
    axes.set(xlabel="optimizer step", ylabel=LABELS[key])
    axes.grid(alpha=0.2)
    if axes.get_legend_handles_labels()[0]:  # none for a run without a recorded step
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    return to_svg(figure)


def _points(rows: list[Row], *, key: str, split: str) -> list[tuple[int, float]]:
    return [(row.step, row.values[key]) for row in rows if row.split == split and key in row.values]


def to_svg(figure: Figure) -> str:
    """Convert a figure to an <svg> element, and close it."""
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg")
    plt.close(figure)  # pyplot keeps every open figure, and a report has dozens
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML header, which may not stand inside HTML
