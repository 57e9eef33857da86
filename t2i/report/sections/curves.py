"""Training curves, and how every run ended."""

from pathlib import Path
from typing import Any

import numpy as np

from t2i.report.figures import LABELS, draw_floors, finish, panels, styles
from t2i.report.sections.section import (
    Section,
    last,
    without_empty_columns,
)
from t2i.study.jobs import run_dir
from t2i.study.results import Curve, curve, floors_of, read_json, runs_of
from t2i.study.spec import Study
from t2i.study.statistics import (
    ema,
)

SMOOTHING = 0.95
"""Decay of the averages that are drawn (paper, Figure 6)."""


def curves(
    study: Study, out: Path, *, arms: list[str], values: list[str], perplexity: bool = False
) -> Section:
    """Draw training curves against tokens, raw and smoothed, a panel a value; the table has the last held-out ones."""
    panels: dict[str, dict[str, Curve]] = {value: {} for value in values}
    table = [["arm", "seeds", *(f"held-out {value}" for value in values)]]
    floors: dict[str, float] = {}
    for arm in arms:
        runs = runs_of(study, arm=arm, out=out)
        floors = floors or floors_of(runs)
        cells = []
        for value in values:
            found = curve(runs, value=value)
            if found is not None:
                panels[value][arm] = found
            cells.append(last(curve(runs, value=value, split="heldout")))
        table.append([arm, str(len(runs)), *cells])
    table = without_empty_columns(table)
    figure = _draw_curves(panels, decay=SMOOTHING, perplexity=perplexity, floors=floors)
    sentence = "; ".join(
        f"{value} ends at "
        + ", ".join(f"{_smoothed_end(one):.3f} ({arm})" for arm, one in panels[value].items())
        for value in values
        if panels[value]
    )
    return Section("Training curves", f"Smoothed by {SMOOTHING}, in nats a token, {sentence}.", figure, table)


def ends(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Tabulate every run: how it ended, what learned, what it cost."""
    table = [
        ["run", "ended", "learned numbers", "optimizer state", "held-out image loss", "tokens", "minutes"]
    ]
    failed = 0
    for arm in arms:
        for seed in study.seeds_of(arm):
            folder = run_dir(out, arm, seed)
            status = read_json(folder / "status.json")
            runs = [run for run in runs_of(study, arm=arm, out=out) if run.seed == seed]
            if not runs:
                failed += 1
                table.append(
                    [
                        folder.name,
                        f"{status.get('state', 'not begun')}: {status.get('reason', '')}",
                        *[""] * 5,
                    ]
                )
                continue
            end = [row for row in runs[0].rows if "split" not in row][-1]
            facts = read_json(folder / "checkpoints" / f"step_{end['step']:06d}" / "manifest.json")
            table.append(
                [
                    folder.name,
                    "done",
                    f"{facts['parameters']['learned']:,} of {facts['parameters']['all']:,}",
                    f"{facts['optimizer_state_bytes'] / 1e6:,.1f} MB",
                    last(curve(runs, value="image_loss", split="heldout")),
                    f"{end['tokens']:,}",
                    f"{end['seconds'] / 60:.1f}",
                ]
            )
    total = sum(len(study.seeds_of(arm)) for arm in arms)
    return Section("Runs", f"{total - failed} of {total} runs ended well.", table=table)


def _smoothed_end(one: Curve) -> float:
    return float(np.mean([ema(row.tolist(), decay=SMOOTHING)[-1] for row in one.values]))


def _draw_curves(
    values: dict[str, dict[str, Curve]], *, decay: float, perplexity: bool, floors: dict[str, float]
) -> Any:
    """Draw each value's panel: every seed raw and pale, the mean of smoothed seeds on top."""
    figure, axes = panels(len(values))
    for axis, (value, arms) in zip(axes, values.items(), strict=True):
        for (arm, one), (colour, dash) in zip(arms.items(), styles(), strict=False):
            smoothed = np.array([ema(row.tolist(), decay=decay) for row in one.values])
            shown = [np.exp(each) if perplexity else each for each in (one.values, smoothed.mean(0))]
            for row in shown[0]:
                axis.plot(one.tokens, row, color=colour, alpha=0.25, linewidth=0.5)
            count = len(one.seeds)
            label = f"{arm} ({count} seed{'s' if count > 1 else ''})"
            axis.plot(one.tokens, shown[1], color=colour, linestyle=dash, label=label)
        if value == "image_loss":
            draw_floors(axis, floors, perplexity=perplexity)
        label = LABELS.get(value, value)
        if perplexity:
            label = label.split(",")[0].replace("loss", "perplexity")
        axis.set(xlabel="tokens trained on", ylabel=label)
        if perplexity:
            axis.set_yscale("log")
        finish(axis)
    return figure
