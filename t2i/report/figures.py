"""Curves as SVG text, from rows of metrics.jsonl."""

import io
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from t2i.study.statistics import ema

# Okabe and Ito's palette without its yellow, and wine: colour-blind readers can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")


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
