"""What figures of a study share: panels, lines that differ in colour and dashes, names of values, floors."""

import math
from itertools import cycle
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

from t2i.report.figures import COLOURS

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
