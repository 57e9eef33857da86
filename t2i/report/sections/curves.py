"""Training curves, and how each run ended."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from t2i.report.figures import LABELS, draw_baselines, finish, only_point, panels, styles
from t2i.report.sections.section import Section, SectionKind, last, without_empty_columns
from t2i.runs.checkpoint_manifest import read_checkpoint_manifest
from t2i.runs.checkpoint_store import last_step, step_folder
from t2i.study.jobs import run_dir
from t2i.study.results import TRAIN_ROWS, Curve, Run, curve, image_baselines, read_run, runs_of
from t2i.study.spec import Study
from t2i.study.statistics import ema

SMOOTHING = 0.95
"""Decay of the moving averages (paper, Figure 6)."""


def curves(
    study: Study, out: Path, *, arms: list[str], values: list[str], perplexity: bool = False
) -> Section:
    """Draw training curves against tokens, raw and smoothed, a panel per value; tabulate the last held-out values."""
    panels: dict[str, dict[str, Curve]] = {value: {} for value in values}
    table = [["arm", "seeds", *(f"held-out {value}" for value in values)]]
    of_arms: list[dict[str, float]] = []
    for arm in arms:
        runs = runs_of(study, arm=arm, out=out)
        of_arms += [own] if (own := image_baselines(runs)) else []
        cells = []
        for value in values:
            found = curve(runs, value=value)
            if found is not None:
                panels[value][arm] = found
            cells.append(last(curve(runs, value=value, split="heldout")))
        table.append([arm, str(len(runs)), *cells])
    # A value that only training rows have, such as the total loss, has no held-out column.
    table = without_empty_columns(table)
    if not any(panels.values()):
        asked = f"No run of {', '.join(arms)} with {' or '.join(values)} is finished."
        return Section("Training curves", asked, table=table)
    # Of arms on the same shards alone: those of other codes are other numbers.
    baselines = of_arms[0] if of_arms and all(one == of_arms[0] for one in of_arms) else {}
    figure = _draw_curves(panels, decay=SMOOTHING, perplexity=perplexity, baselines=baselines)
    sentence = "; ".join(
        f"{value} ends at "
        + ", ".join(f"{_smoothed_end(one):.3f} ({arm})" for arm, one in panels[value].items())
        for value in values
        if panels[value]
    )
    of_codes = ", of image_loss per code" if panels.get("image_loss") else ""
    is_of_one = all(one == of_arms[0] for one in of_arms)
    several = (
        "" if is_of_one else " Not all arms have the same codes; losses of different codes do not compare."
    )
    return Section(
        "Training curves",
        f"Training losses, smoothed (EMA, {SMOOTHING}), in nats per token{of_codes}: {sentence}.{several}",
        figure,
        table,
    )


def ends(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Tabulate every run: how it ended, its trainable parameters, its cost."""
    table = [
        [
            "run",
            "ended",
            "trainable parameters",
            "optimizer state",
            "held-out image loss",
            "tokens",
            "minutes",
        ]
    ]
    # Every run and not only those that ended well: this is the table that says which are missing above.
    runs = [read_run(run_dir(out, arm, seed), seed=seed) for arm in arms for seed in study.seeds_of(arm)]
    table += [_end(run) for run in runs]
    ended = sum(run.is_done for run in runs)
    return Section("Runs", f"{ended} of {len(runs)} runs ended well.", table=table)


def _end(run: Run) -> list[str]:
    """Write one run as a row of the table."""
    if not run.is_done:
        return [run.folder.name, ": ".join(filter(None, (run.state or "not begun", run.reason))), *[""] * 5]
    end = [row for row in run.rows if row.split == TRAIN_ROWS][-1]
    # Of the newest checkpoint: the last step has a row only in runs since 0.1.
    facts = read_checkpoint_manifest(step_folder(run.folder, last_step(run.folder))).facts
    return [
        run.folder.name,
        "done",
        f"{facts.parameters['learned']:,} of {facts.parameters['all']:,}",
        f"{facts.optimizer_state_bytes / 1e6:,.1f} MB",
        last(curve([run], value="image_loss", split="heldout")),
        f"{int(end.values['tokens']):,}",
        f"{end.values['seconds'] / 60:.1f}",
    ]


def _smoothed_end(one: Curve) -> float:
    return float(np.mean([ema(row.tolist(), decay=SMOOTHING)[-1] for row in one.values]))


def _draw_curves(
    values: dict[str, dict[str, Curve]], *, decay: float, perplexity: bool, baselines: dict[str, float]
) -> Figure:
    """Draw each value's panel: every seed raw and pale, with the means of smoothed seeds on top of them all."""
    figure, axes = panels(len(values))
    for axis, (value, arms) in zip(axes, values.items(), strict=True):
        for (arm, one), (colour, dash) in zip(arms.items(), styles(), strict=False):
            alpha = 0.3 / len(arms) ** 0.5  # raw lines of many arms would hide the means
            smoothed = np.array([ema(row.tolist(), decay=decay) for row in one.values])
            shown = [np.exp(each) if perplexity else each for each in (one.values, smoothed.mean(0))]
            for row in shown[0]:
                marker = only_point(row)
                axis.plot(one.tokens, row, color=colour, alpha=alpha, linewidth=0.5, marker=marker, zorder=1)
            count = len(one.seeds)
            label = f"{arm} ({count} seed{'s' if count > 1 else ''})"
            marker = only_point(shown[1])
            axis.plot(one.tokens, shown[1], color=colour, linestyle=dash, label=label, marker=marker)
        if value == "image_loss":  # the baselines are of codes; text tokens have others
            draw_baselines(axis, baselines, perplexity=perplexity)
        label = LABELS.get(value, value)
        if perplexity:
            label = label.split(",")[0].replace("loss", "perplexity")
        axis.set(xlabel="tokens trained on", ylabel=label)
        if perplexity:
            axis.set_yscale(
                "log"
            )  # perplexities fall by factors; on a linear axis only the start would be seen
        finish(axis, tokens="x")
    return figure


SECTIONS = (
    SectionKind("curves", reads="metrics.jsonl of runs", make=curves),
    SectionKind("ends", reads="status.json, metrics.jsonl and checkpoint manifests of runs", make=ends),
)
