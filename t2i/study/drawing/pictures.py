"""What pictures cost and look like: places, captions, scores, reconstructions, published numbers."""

from pathlib import Path
from typing import Any

import matplotlib.dates
import matplotlib.pyplot as plt
import numpy as np

from t2i.report.figures import COLOURS, draw_floors, finish, panels, styles
from t2i.study.results import Curve


def published(rows: list[dict[str, str]]) -> Any:
    """Draw FIDs over time: colour by family, filled where a pre-trained language model is used."""
    figure, (axis,) = panels(1)
    figure.set_size_inches(7.4, 4.2)
    for family, colour, marker in zip(("auto-regressive", "diffusion"), COLOURS, "os", strict=False):
        for used in ("no", "yes"):
            chosen = [
                row for row in rows if row["family"] == family and row["pretrained_language_model"] == used
            ]
            axis.plot(
                [np.datetime64(row["date"]) for row in chosen],
                [float(row["fid"]) for row in chosen],
                marker,
                color=colour,
                fillstyle="full" if used == "yes" else "none",
                label=f"{family}, {'with' if used == 'yes' else 'no'} pre-trained language model",
            )
    ordered = sorted(rows, key=lambda row: (row["date"], -float(row["fid"])))
    for place, row in enumerate(ordered):  # names above and below in turn, so that neighbours do not overlap
        axis.annotate(
            row["model"], (np.datetime64(row["date"]), float(row["fid"])), (0, -11 if place % 2 else 5), fontsize=6,
            textcoords="offset points", ha="center",
        )  # fmt: skip
    axis.margins(x=0.12, y=0.1)
    axis.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%Y-%m"))
    axis.set(xlabel="first published", ylabel="zero-shot FID on MS-COCO")
    finish(axis)
    return figure


def picture(path: Path, *, title: str) -> Any:
    """Show a picture file as it is."""
    image = plt.imread(path)
    figure, (axis,) = panels(1)
    figure.set_size_inches(9, 9 * image.shape[0] / image.shape[1] + 0.4)
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=title)
    return figure


def places(losses: dict[str, np.ndarray], *, floors: dict[str, float]) -> Any:
    """Draw image loss by row and by column of the code grid, and where the first arm is better than the second.

    Args:
        losses: arm -> (side, side) nats a code, mean over seeds.
    """
    arms = list(losses)
    figure, axes = panels(3 if len(arms) > 1 else 2)
    for axis, name, direction in zip(axes, ("row", "column"), (1, 0), strict=False):
        for (arm, grid), (colour, dash) in zip(losses.items(), styles(), strict=False):
            axis.plot(grid.mean(direction), color=colour, linestyle=dash, label=arm)
        draw_floors(axis, floors)
        axis.set(xlabel=f"{name} of the code grid", ylabel="image loss, nats a code")
        finish(axis)
    if len(arms) > 1:
        change = losses[arms[0]] - losses[arms[1]]
        limit = max(float(np.abs(change).max()), 1e-9)
        shown = axes[2].imshow(change, cmap="PuOr", vmin=-limit, vmax=limit)
        figure.colorbar(shown, ax=axes[2], label="nats a code")
        axes[2].set(title=f"{arms[0]} - {arms[1]}", xlabel="column", ylabel="row")
    return figure


def conditioning(worth: dict[str, dict[str, Curve]]) -> Any:
    """Draw what a caption is worth in nats an image, a panel for each kind of other caption."""
    figure, axes = panels(len(worth))
    for axis, (other, arms) in zip(axes, worth.items(), strict=True):
        axis.axhline(0, color="0.5", linewidth=0.8)
        for (arm, one), (colour, dash) in zip(arms.items(), styles(), strict=False):
            axis.plot(one.tokens, one.values.mean(0), color=colour, linestyle=dash, label=arm)
            axis.fill_between(one.tokens, one.values.min(0), one.values.max(0), color=colour, alpha=0.15)
        axis.set(xlabel="tokens trained on", ylabel=f"{other} - own caption, nats an image")
        finish(axis)
    return figure


def agreement(points: dict[str, list[tuple[float, float]]], *, measure: str, floors: dict[str, float]) -> Any:
    """Draw each run's distance against its held-out image loss, a colour an arm."""
    figure, (axis,) = panels(1)
    markers = "os^Dv<>Phd*"
    for place, ((arm, found), (colour, _)) in enumerate(zip(points.items(), styles(), strict=False)):
        marker = markers[place % len(markers)]
        axis.plot(*zip(*found, strict=True), marker, color=colour, label=arm)
    for name, floor in floors.items():
        axis.axvline(floor, color="0.6", linewidth=0.7, linestyle=":")
        axis.text(
            floor, 0.01, name, transform=axis.get_xaxis_transform(), fontsize=6, color="0.4", rotation=90
        )
    axis.set(xlabel="held-out image loss, nats a code", ylabel=measure)
    finish(axis)
    return figure
