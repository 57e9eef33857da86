"""Which value each arm was trained with, and what the others gave."""

from pathlib import Path

from matplotlib.figure import Figure

from t2i.cli import flags_of_mapping
from t2i.report.figures import LABELS, finish, panels, styles
from t2i.report.sections.section import Section, SectionKind
from t2i.study.spec import Study, Tuning
from t2i.study.tuning import Tuned, tuned, tuning_of


def tuning(study: Study, out: Path) -> Section:
    """Tabulate every arm's trials: the held-out loss for each value, and the value that its runs took."""
    if study.tuning is None:
        return Section(
            "Tuning", "This study tunes nothing: all arms have the settings that are written in its file."
        )
    asked, found = tuning_of(study), {arm: tuned(study, arm=arm, out=out) for arm in study.arms}
    table = [["arm", *(f"{value:g}" for value in asked.values), f"chosen {asked.key}"]]
    for arm, one in found.items():
        losses = [f"{one.losses[value]:.4f}" for value in asked.values]
        chosen = (
            "not known"
            if one.chosen is None
            else f"{one.chosen:g}{' (at the edge)' if one.is_at_edge else ''}"
        )
        table.append([arm, *losses, chosen])
    edges = [arm for arm, one in found.items() if one.is_at_edge]
    sentence = (
        f"Each arm was tried with {len(asked.values)} values of {asked.key} on seed {asked.seed}, which no comparison"
        f" has, and trained with the one whose held-out {asked.loss} ended lowest.{_of_trials(asked)}"
    )
    if edges:
        sentence += (
            f" Of {', '.join(edges)} it is the smallest or largest tried: a better one may lie beyond it."
        )
    return Section(
        "Each arm at its own best value", sentence, _draw(found, key=asked.key, loss=asked.loss), table
    )


def _of_trials(asked: Tuning) -> str:
    """Say in which settings trials differ from the runs that they choose a value for."""
    return f" Trials had {' '.join(flags_of_mapping(asked.settings))}." if asked.settings else ""


def _draw(found: dict[str, Tuned], *, key: str, loss: str) -> Figure:
    """Draw each arm's loss against the values tried."""
    figure, (axis,) = panels(1)
    for (arm, one), (colour, dash) in zip(found.items(), styles(), strict=False):
        values = sorted(one.losses)
        axis.plot(
            values,
            [one.losses[value] for value in values],
            color=colour,
            linestyle=dash,
            marker="o",
            label=arm,
        )
    axis.set_xscale("log")
    # A logarithmic axis marks 2, 3 and 4 of each power of ten, whose labels lie over one another.
    tried = sorted({value for one in found.values() for value in one.losses})
    axis.set_xticks(tried, [f"{value:g}" for value in tried])
    axis.minorticks_off()
    axis.set(xlabel=key, ylabel=f"held-out {LABELS.get(loss, loss)}")
    finish(axis)
    return figure


SECTIONS = (SectionKind("tuning", reads="metrics.jsonl of trials", make=tuning),)
