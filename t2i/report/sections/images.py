"""What pictures cost and look like: published numbers, reconstructions, places, captions, perplexity against FID."""

import csv
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from t2i.data.shards.manifest import RECONSTRUCTIONS
from t2i.measure.perplexity import PERPLEXITY
from t2i.measure.protocol import SCORES
from t2i.report.sections.section import Section, last
from t2i.runs.loading import DATA_MANIFEST
from t2i.study.drawing import pictures as drawing
from t2i.study.results import Curve, Run, curve, floors_of, read_json, runs_of
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
    return Section("Published FIDs", sentence, drawing.published(rows), table)


def reconstructions(study: Study, out: Path, *, shards: str) -> Section:
    """Show pictures beside what the image tokenizer makes of them (Figure 2), as preparing the shards left them."""
    folder = Path(shards.replace("{out}", str(out)))
    if not (folder / RECONSTRUCTIONS).is_file():
        return Section("Reconstructions", f"{folder} has no {RECONSTRUCTIONS}.")
    manifest = read_json(folder / "manifest.json")
    sentence = (
        f"Pictures of {manifest['source']}, and the same after {manifest['codes_per_image']} codes of"
        f" {manifest['codebook_size']}: what no model of these codes can do better than."
    )
    title = "originals above, reconstructions below"
    figure = drawing.picture(folder / RECONSTRUCTIONS, title=title)
    return Section("Reconstructions", sentence, figure)


def places(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Draw image loss by place on the code grid, of the first held-out split of perplexity.json."""
    table = [["arm", "seeds", "text", "image", "special", "total", "bits a pixel"]]
    grids: dict[str, np.ndarray] = {}
    for arm in arms:
        found = [one for run in runs_of(study, arm=arm, out=out) if (one := _first_split(run))]
        if not found:
            continue
        nats = [
            [one[kind]["nats"] for one in found if one[kind]]
            for kind in ("text", "image", "special", "total")
        ]
        bits = [one["bits_per_pixel"] for one in found if "bits_per_pixel" in one]
        cells = [f"{np.mean(values):.4f}" if values else "-" for values in [*nats, bits]]
        table.append([arm, str(len(found)), *cells])
        codes = np.mean([one["image_loss_by_code"] for one in found if "image_loss_by_code" in one], axis=0)
        side = math.isqrt(codes.size)
        if codes.ndim and side**2 == codes.size:
            grids[arm] = codes.reshape(side, side)
    if not grids:
        return Section("Loss by place", f"No run of {', '.join(arms)} has {PERPLEXITY} with a square grid.")
    floors = floors_of(runs_of(study, arm=next(iter(grids)), out=out))
    sentence = "; ".join(
        f"{arm}: first row {grid[0].mean():.3f}, last row {grid[-1].mean():.3f} nats a code"
        for arm, grid in grids.items()
    )
    names = list(grids)
    if len(names) > 1:
        share = float((grids[names[0]] < grids[names[1]]).mean())
        sentence += f". {names[0]} costs less than {names[1]} at {share:.0%} of the places"
    return Section("Loss by place", f"{sentence}.", drawing.places(grids, floors=floors), table)


def conditioning(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Draw what the own caption is worth against an empty and a wrong one, in nats an image, along training."""
    worth: dict[str, dict[str, Curve]] = {"empty": {}, "wrong": {}}
    table = [
        ["arm", "own caption, nats a code", "empty", "wrong", "empty - own, nats an image", "wrong - own"]
    ]
    for arm in arms:
        runs = runs_of(study, arm=arm, out=out)
        own = curve(runs, value="image_loss", split="heldout")
        if own is None:
            continue
        codes = read_json(runs[0].folder / DATA_MANIFEST)["codes_per_image"]
        cells = [last(own)]
        for other, panel in worth.items():
            found = curve(runs, value=f"image_loss_{other}_caption", split="heldout")
            assert found is not None, "held-out rows carry all three"
            panel[arm] = Curve(own.steps, own.tokens, (found.values - own.values) * codes, own.seeds)
            cells.append(last(found))
        table.append([arm, *cells, *(last(panel[arm]) for panel in worth.values())])
    if len(table) == 1:
        return Section("What a caption is worth", f"{', '.join(arms)} has no finished run.")
    sentence = "; ".join(
        f"{arm}: {one.values[:, -1].mean():.1f} nats an image less under the own caption than under none"
        for arm, one in worth["empty"].items()
    )
    return Section("What a caption is worth", f"{sentence}.", drawing.conditioning(worth), table)


def agreement(study: Study, out: Path, *, arms: list[str], measure: str) -> Section:
    """Draw a distance of scores.json against held-out image loss, a point a run, with their rank agreement.

    Args:
        measure: key of scores.json, such as fid.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    table = [["run", "held-out image loss", measure, "n", "features"]]
    for arm in arms:
        for run in runs_of(study, arm=arm, out=out):
            files = sorted((run.folder / "eval").glob(f"step_*/{SCORES}"))
            scores, loss = (
                read_json(files[-1]) if files else {},
                curve([run], value="image_loss", split="heldout"),
            )
            if measure not in scores or loss is None:
                continue
            points.setdefault(arm, []).append((float(loss.values[0, -1]), scores[measure]))
            cells = [
                f"{loss.values[0, -1]:.4f}",
                f"{scores[measure]:.4g}",
                str(scores["n"]),
                scores["features"],
            ]
            table.append([run.folder.name, *cells])
    runs = [point for found in points.values() for point in found]
    if len(runs) < 2:
        return Section("Perplexity or distance", f"Fewer than two runs have {measure}.", table=table)
    means = [tuple(np.mean(found, axis=0)) for found in points.values()]
    sentence = f"Kendall's tau of the orders by loss and by {measure}: {_tau(runs)} over {len(runs)} runs"
    if len(means) > 1:
        sentence += f", {_tau(means)} over the means of {len(means)} arms"
    floors = floors_of(runs_of(study, arm=next(iter(points)), out=out))
    figure = drawing.agreement(points, measure=measure, floors=floors)
    return Section("Perplexity or distance", f"{sentence}; 1 is the same order.", figure, table)


def _first_split(run: Run) -> dict[str, Any]:
    splits = read_json(run.folder / PERPLEXITY).get("splits", {})
    return next(iter(splits.values()), {})


def _tau(points: Sequence[tuple[float, ...]]) -> str:
    losses, distances = zip(*points, strict=True)
    if all(one == two for one, two in pairwise(losses)):
        return "unknown"
    return f"{rank_agreement(losses, distances):+.2f}"
