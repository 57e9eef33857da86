"""What figures share: panels, lines told apart by colour and dashes, names of values, floors; a figure as SVG text."""

import io
import math
from itertools import cycle
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

from t2i.study.statistics import ema

# Okabe and Ito's palette without its yellow, and wine: colour-blind readers can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
LABELS = {
    "loss": "loss, nats a token",
    "text_loss": "text loss, nats a token",
    "image_loss": "image loss, nats a code",
    "text_loss_text_rows": "held-out text among text rows,\nnats a token",
    "leaked": "probability that leaks from text",
}


def panels(count: int) -> tuple[Any, Any]:
    """Make a row of panels: the figure and its axes."""
    figure, axes = plt.subplots(1, count, figsize=(4.2 * count, 3.2), squeeze=False)
    return figure, axes[0]


def styles() -> Any:
    """Yield a colour and a dash for each line, without end: callers stop at their own last line."""
    return zip(cycle(COLOURS), cycle(DASHES), strict=False)


def draw_floors(axis: Any, floors: dict[str, float], *, perplexity: bool = False) -> None:
    """Draw what counting costs as named lines across."""
    for share, (name, floor) in zip(cycle((0.01, 0.5)), floors.items(), strict=False):
        level = math.exp(floor) if perplexity else floor
        axis.axhline(level, color="0.6", linewidth=0.7, linestyle=":")
        place = axis.get_yaxis_transform()  # across by share of the axis, up by value
        axis.text(share, level, name.replace("_", " "), transform=place, fontsize=6, color="0.4", va="bottom")


def finish(axis: Any) -> None:
    """Add a grid, tokens as 500k and 2M, and, where lines have names, a legend."""
    axis.grid(alpha=0.2)
    for one in (axis.xaxis, axis.yaxis):
        if "tokens" in one.get_label_text():
            one.set_major_formatter(EngFormatter(sep=""))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)


def loss_curves(rows: list[dict[str, Any]], *, kind: str, floors: dict[str, float]) -> str:
    """Draw training loss, raw and smoothed, and held-out losses of one kind ("image" or "text") as SVG."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    key = f"{kind}_loss"
    train = [(row["step"], row[key]) for row in rows if "split" not in row and row.get(key) is not None]
    if train:
        steps, values = zip(*train, strict=True)
        axes.plot(steps, values, color=COLOURS[0], alpha=0.25, linewidth=0.8)
        axes.plot(steps, ema(values), color=COLOURS[0], label="training (average, 0.95)")
    for colour, split in zip(COLOURS[1:], ("heldout", "combinations"), strict=False):
        points = [
            (row["step"], row[key]) for row in rows if row.get("split") == split and row.get(key) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=split)
    for style, (name, floor) in zip(("-.", "--", ":", (0, (1, 4))), floors.items(), strict=False):
        axes.axhline(floor, color="0.5", linewidth=0.8, linestyle=style, label=f"{name}: {floor:.2f}")
    axes.set(xlabel="optimizer step", ylabel=f"{kind} loss, nats a token")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    return to_svg(figure)


def to_svg(figure: Any) -> str:
    """Write a figure out as the <svg> element alone, and close it."""
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
