"""Rows of the vocabulary: alignment, nearest text tokens, the semantics probe."""

from pathlib import Path
from typing import Any

import numpy as np

from t2i.report.figures import finish, panels, styles
from t2i.report.sections.section import Section, read_files
from t2i.runs.metrics_log import read_metrics
from t2i.study.results import read_json
from t2i.study.spec import Study
from t2i.train.align import SUMMARY


def alignment(study: Study, out: Path, *, folder: str) -> Section:
    """Draw the contrastive alignment's loss and temperature; the table has retrieval beside chance (Figure 7)."""
    path = Path(folder.replace("{out}", str(out)))
    summary = read_json(path / SUMMARY)
    sides = [name for name in summary if name != "settings"]
    if not sides:
        return Section("Alignment", f"{path} holds no finished alignment.")
    table = [
        ["rows", "picture finds caption", "caption finds picture", "chance", "held-out pairs", "temperature"]
    ]
    for name in sides:
        one = summary[name]
        shares = [f"{one[key]:.2%}" for key in ("image_to_text", "text_to_image", "chance")]
        table.append([name, *shares, str(one["num_pairs"]), f"{one['temperature']:.4f}"])
    best = max(summary[name]["image_to_text"] / summary[name]["chance"] for name in sides)
    sentence = (
        f"A picture finds its caption among held-out ones at most {best:.1f} times as often as by chance."
    )
    return Section("Alignment", sentence, _draw_alignment(path, sides), table)


def nearest(study: Study, out: Path, *, files: dict[str, str], rows: str = "input") -> Section:
    """Draw cosines of image rows to their nearest text rows beside text and random rows, for nearest.json files."""
    found = {name: one[rows] for name, one in read_files(files, out=out).items() if rows in one}
    if not found:
        return Section("Nearest text tokens", "No file of nearest tokens was made.")
    table = [
        [
            "model",
            "median image",
            "median random",
            "median text",
            "random row nearer",
            "code 0 to 3, nearest token",
        ]
    ]
    for name, one in found.items():
        medians = [f"{one[kind]['0.50']:.3f}" for kind in ("image", "random", "text")]
        tokens = " ".join(repr(tokens[0]) for tokens in one["nearest_tokens"][:4])
        table.append([name, *medians, f"{one['compared']['random_nearer']:.1%}", tokens])
    shares = ", ".join(f"{one['compared']['random_nearer']:.0%} ({name})" for name, one in found.items())
    sentence = f"A random row is nearer to text than an image row in {shares}; 50% would be no difference from noise."
    return Section("Nearest text tokens", sentence, _draw_cosines(found), table)


def probe(study: Study, out: Path, *, folder: str, files: dict[str, str]) -> Section:
    """Tabulate what image codes share with words: retrieval by bags of rows, nearness to text, CKA with training.

    Args:
        folder: of the alignment.
        files: nearest.json files; those made with --before have linear CKA.
    """
    summary = read_json(Path(folder.replace("{out}", str(out))) / SUMMARY)
    table = [["what", "rows", "value", "what nothing would give"]]
    for name, one in summary.items():
        if name != "settings":
            chance = f"{one['chance']:.2%}"
            for key in ("image_to_text", "text_to_image"):
                table.append([f"alignment, {key.replace('_', ' ')}", name, f"{one[key]:.2%}", chance])
    for model, sides in read_files(files, out=out).items():
        for side in ("input", "output"):
            nearer = 1 - sides[side]["compared"]["random_nearer"]
            table.append([f"{model}: nearer to text than a random row", side, f"{nearer:.1%}", "50.0%"])
            if "cka" in sides[side]:
                cells = [f"{sides[side]['cka']:.3f}", "near 0; 1 is no change but a turn"]
                table.append([f"{model}: CKA of image rows before and after", side, *cells])
    ratios = [one["image_to_text"] / one["chance"] for name, one in summary.items() if name != "settings"]
    sentence = (
        f"A bag of codes finds its caption {max(ratios):.1f} times as often as chance"
        if ratios
        else "Not aligned"
    )
    return Section(
        "Semantics probe", f"{sentence}; {len(table) - 1} numbers beside their controls.", table=table
    )


def _draw_alignment(folder: Path, sides: list[str]) -> Any:
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


def _draw_cosines(found: dict[str, dict[str, Any]]) -> Any:
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
