"""Images: published numbers, loss by position, caption sensitivity, perplexity against FID."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.dates
import numpy as np
from matplotlib.figure import Figure

from t2i.measure.perplexity import PERPLEXITY
from t2i.report.figures import COLOURS, draw_baselines, draw_mean_and_range, finish, panels, styles
from t2i.report.sections.section import Section, SectionKind, last
from t2i.study.measured import read_perplexity, read_score
from t2i.study.results import Curve, codes_per_image, curve, image_baselines, runs_of
from t2i.study.spec import Study
from t2i.study.statistics import rank_agreement

PUBLISHED = Path(__file__).parents[1] / "published_fid.csv"


def published(study: Study, out: Path) -> Section:
    """Draw published zero-shot FIDs over time (Figure 1); the table has the source of each."""
    with PUBLISHED.open() as file:
        rows = list(csv.DictReader(file))
    used = [row for row in rows if row["pretrained_language_model"] == "yes"]
    regressive = [row["model"] for row in used if row["family"] == "auto-regressive"]
    sentence = (
        f"Of {len(rows)} published numbers, {len(used)} are of models with a pre-trained language model; the"
        f" auto-regressive ones among them: {', '.join(regressive)}. Protocols differ from paper to paper."
    )
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    return Section("Published FIDs", sentence, _draw_published(rows), table)


def places(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Draw image loss by position on the code grid, for the first held-out split of perplexity.json."""
    table = [["arm", "seeds", "text", "image", "special", "total", "bits per pixel"]]
    grids: dict[str, np.ndarray] = {}
    for arm in arms:
        found = [one for run in runs_of(study, arm=arm, out=out) if (one := read_perplexity(run.folder))]
        if not found:
            continue
        nats = [
            [one.nats[kind] for one in found if kind in one.nats]
            for kind in ("text", "image", "special", "total")
        ]
        bits = [one.bits_per_pixel for one in found if one.bits_per_pixel is not None]
        cells = [f"{np.mean(values):.4f}" if values else "-" for values in [*nats, bits]]
        table.append([arm, str(len(found)), *cells])
        codes = [one.image_loss_by_code for one in found if one.image_loss_by_code is not None]
        # Codes of a grid that is not square, or of a tokenizer without one, have no rows and columns to draw.
        side = math.isqrt(codes[0].size) if codes else 0
        if codes and side**2 == codes[0].size:
            grids[arm] = np.mean(codes, axis=0).reshape(side, side)
    if not grids:
        sentence = f"No run of {', '.join(arms)} has {PERPLEXITY} with a square grid."
        return Section("Loss by place", sentence, table=table if len(table) > 1 else [])
    baselines = image_baselines(runs_of(study, arm=next(iter(grids)), out=out))
    sentence = "; ".join(
        f"{arm}: first row {grid[0].mean():.3f}, last row {grid[-1].mean():.3f} nats per code"
        for arm, grid in grids.items()
    )
    names = list(grids)
    if _are_comparable(grids):
        share = float((grids[names[0]] < grids[names[1]]).mean())
        sentence += f". {names[0]} costs less than {names[1]} at {share:.0%} of the positions"
    return Section("Loss by place", f"{sentence}.", _draw_places(grids, baselines=baselines), table)


def conditioning(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Draw caption sensitivity: null and shuffled minus matched caption, in nats per image, during training."""
    keys = {"null": "image_loss_empty_caption", "shuffled": "image_loss_wrong_caption"}
    worth: dict[str, dict[str, Curve]] = {other: {} for other in keys}
    table = [
        [
            "arm",
            "matched caption, nats per code",
            *keys,
            "null - matched, nats per image",
            "shuffled - matched",
        ]
    ]
    for arm in arms:
        runs = runs_of(study, arm=arm, out=out)
        matched = curve(runs, value="image_loss", split="heldout")
        if matched is None:
            continue
        codes = codes_per_image(runs[0])
        cells = [last(matched)]
        for other, panel in worth.items():
            found = curve(runs, value=keys[other], split="heldout")
            cells.append(last(found))
            if found is None:  # a split of one image has no shuffled caption
                continue
            # Per image and not per code: what a caption says is of the image as a whole.
            panel[arm] = Curve(
                matched.steps, matched.tokens, (found.values - matched.values) * codes, matched.seeds
            )
        table.append([arm, *cells, *(last(panel.get(arm)) for panel in worth.values())])
    if len(table) == 1:
        return Section("Caption sensitivity", f"{', '.join(arms)} has no finished run.")
    sentence = "; ".join(
        f"{arm}: {one.values[:, -1].mean():.1f} nats per image less under the matched caption than under none"
        for arm, one in worth["null"].items()
    )
    return Section("Caption sensitivity", f"{sentence}.", _draw_conditioning(worth), table)


def agreement(study: Study, out: Path, *, arms: list[str], measure: str) -> Section:
    """Draw a distance of scores.json against held-out image loss, a point per run, with their rank agreement.

    Args:
        measure: key of scores.json, such as fid.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    table = [["run", "held-out image loss", measure, "n", "features"]]
    for arm in arms:
        for run in runs_of(study, arm=arm, out=out):
            score = read_score(run.folder, measure=measure)
            loss = curve([run], value="image_loss", split="heldout")
            if score is None or loss is None:
                continue
            end = float(loss.values[0, -1])
            points.setdefault(arm, []).append((end, score.value))
            cells = [f"{end:.4f}", f"{score.value:.4g}", str(score.num_images), score.features]
            table.append([run.folder.name, *cells])
    runs = [point for found in points.values() for point in found]
    if len(runs) < 2:  # one point has no order
        return Section("Perplexity or distance", f"Fewer than two runs have {measure}.", table=table)
    # Over runs, seeds of one arm compete with each other; over arms, their noise is averaged out. Both are reported.
    means = [tuple(np.mean(found, axis=0)) for found in points.values()]
    sentence = f"Kendall's tau of the orders by loss and by {measure}: {_tau(runs)} over {len(runs)} runs"
    if len(means) > 1:
        sentence += f", {_tau(means)} over the means of {len(means)} arms"
    baselines = image_baselines(runs_of(study, arm=next(iter(points)), out=out))
    figure = _draw_agreement(points, measure=measure, baselines=baselines)
    return Section("Perplexity or distance", f"{sentence}; 1 is the same order.", figure, table)


def _tau(points: Sequence[tuple[float, ...]]) -> str:
    losses, distances = zip(*points, strict=True)
    tau = rank_agreement(losses, distances)
    return "unknown" if math.isnan(tau) else f"{tau:+.2f}"  # of equal losses, or of equal distances


def _draw_published(rows: list[dict[str, str]]) -> Figure:
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


def _are_comparable(grids: dict[str, np.ndarray]) -> bool:
    """Whether there are two first arms, with codes at the same places."""
    shapes = [grid.shape for grid in grids.values()][:2]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def _draw_places(losses: dict[str, np.ndarray], *, baselines: dict[str, float]) -> Figure:
    """Draw image loss by row and column of the code grid, and where the first arm is better than the second.

    Args:
        losses: arm -> (side, side) nats per code, mean over seeds.
    """
    arms = list(losses)
    figure, axes = panels(3 if _are_comparable(losses) else 2)
    for axis, name, direction in zip(axes, ("row", "column"), (1, 0), strict=False):
        for (arm, grid), (colour, dash) in zip(losses.items(), styles(), strict=False):
            axis.plot(grid.mean(direction), color=colour, linestyle=dash, label=arm)
        draw_baselines(axis, baselines)
        axis.set(xlabel=f"{name} of the code grid", ylabel="image loss, nats per code")
        finish(axis)
    if _are_comparable(losses):
        change = losses[arms[0]] - losses[arms[1]]
        # The same limit on both sides, so that no colour is no difference; above zero, or two equal arms have no scale.
        limit = max(float(np.abs(change).max()), 1e-9)
        shown = axes[2].imshow(change, cmap="PuOr", vmin=-limit, vmax=limit)
        figure.colorbar(shown, ax=axes[2], label="nats per code")
        axes[2].set(title=f"{arms[0]} - {arms[1]}", xlabel="column", ylabel="row")
    return figure


def _draw_conditioning(worth: dict[str, dict[str, Curve]]) -> Figure:
    """Draw caption sensitivity in nats per image, a panel per kind of other caption."""
    figure, axes = panels(len(worth))
    for axis, (other, arms) in zip(axes, worth.items(), strict=True):
        axis.axhline(0, color="0.5", linewidth=0.8)
        for (arm, one), (colour, dash) in zip(arms.items(), styles(), strict=False):
            draw_mean_and_range(axis, one, colour=colour, dash=dash, label=arm)
        axis.set(xlabel="tokens trained on", ylabel=f"{other} - matched caption,\nnats per image")
        finish(axis, tokens="x")
    return figure


def _draw_agreement(
    points: dict[str, list[tuple[float, float]]], *, measure: str, baselines: dict[str, float]
) -> Figure:
    """Draw each run's distance against its held-out image loss, a colour an arm."""
    figure, (axis,) = panels(1)
    markers = "os^Dv<>Phd*"
    for place, ((arm, found), (colour, _)) in enumerate(zip(points.items(), styles(), strict=False)):
        marker = markers[place % len(markers)]
        axis.plot(*zip(*found, strict=True), marker, color=colour, label=arm)
    for name, baseline in baselines.items():
        axis.axvline(baseline, color="0.6", linewidth=0.7, linestyle=":")
        axis.text(
            baseline,
            0.01,
            name.replace("_", " "),
            transform=axis.get_xaxis_transform(),
            fontsize=6,
            color="0.4",
            rotation=90,
        )
    axis.set(xlabel="held-out image loss, nats per code", ylabel=measure)
    finish(axis)
    return figure


SECTIONS = (
    SectionKind("published", reads="a table that ships with t2i", make=published),
    SectionKind("places", reads="perplexity.json of runs", make=places),
    SectionKind("conditioning", reads="metrics.jsonl of runs", make=conditioning),
    SectionKind("agreement", reads="metrics.jsonl and scores.json of runs", make=agreement),
)
