"""Rows of the vocabulary: alignment, cosines to text."""

from pathlib import Path
from typing import Any

import numpy as np

from t2i.report.figures import finish, panels, styles
from t2i.runs.metrics_log import read_metrics


def alignment_curves(folder: Path, sides: list[str]) -> Any:
    """Draw contrastive loss and temperature against steps (paper, Figure 7)."""
    figure, axes = panels(2)
    rows = [row for row in read_metrics(folder) if "split" not in row]
    for axis, value in zip(axes, ("loss", "temperature"), strict=True):
        for side, (colour, dash) in zip(sides, styles(), strict=False):
            points = [(row["step"], row[value]) for row in rows if row["rows"] == side]
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=dash, label=side)
        axis.set(xlabel="step", ylabel="contrastive loss, nats" if value == "loss" else value)
        finish(axis)
    return figure


def cosines(found: dict[str, dict[str, Any]]) -> Any:
    """Draw, a panel a model, how near image, random and text rows are to their nearest text row."""
    figure, axes = panels(len(found))
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        every = np.concatenate([one["cosines"][kind] for kind in ("image", "random", "text")])
        bins = np.linspace(every.min(), every.max(), 50)
        for kind, (colour, dash) in zip(("image", "random", "text"), styles(), strict=False):
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
        finish(axis)
    return figure
