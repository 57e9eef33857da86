"""A law of model size, tokens and age of the language model, and whether it predicts cells that it has not seen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from t2i.errors import UserError
from t2i.report.figures import LABELS, finish, panels, styles
from t2i.report.sections.grid import Grid, read_grid
from t2i.report.sections.predictions import Prediction, outcome, prediction_table, predictions_of, worths_of
from t2i.report.sections.section import Section, SectionKind
from t2i.study.jobs import run_config
from t2i.study.law import COVERAGE, Cells, Fit, fit_law, nearest, pairs_of
from t2i.study.spec import Study, nearest_name


def law(
    study: Study,
    out: Path,
    *,
    ages: dict[str, str | float],
    steps: list[int],
    held_out: dict[str, list[int]],
    value: str = "image_loss",
) -> Section:
    """Fit a law to the arms that are not held out, and tabulate what it says of the held-out cells beside what came.

    Without finished runs of the held-out arms it says what is predicted of them. Losses are means over the seeds that
    every fitted arm has finished, those of held-out arms too.

    Args:
        ages: arm -> tokens of text that its start had seen, or the folder of the run that made it, such as that of a
            step of the study; 0 for none.
        steps: those of the fitted cells.
        held_out: arm -> steps; these arms are not fitted.
    """
    grid = read_grid(study, out, ages=ages, value=value)
    asked = [arm for arm in ages if arm not in held_out]
    fitted = {arm: steps for arm in asked if all(grid.has(arm, step) for step in steps)}
    seeds = _common_seeds(grid, fitted)
    missing = _missing(study, grid, asked=asked, fitted=fitted, seeds=seeds)
    if not seeds:
        return Section("A law", f"Nothing is fitted: no seed is finished at steps {steps}. {missing}")
    known = grid.tokens()
    if unknown := sorted({step for steps in held_out.values() for step in steps} - known.keys()):
        raise UserError(f"law: held_out has step {unknown[0]}; measured are {', '.join(map(str, known))}.")
    cells, losses = grid.cells(fitted), grid.losses(fitted, seeds=seeds)
    try:
        fit = fit_law(cells, losses)
    except ValueError as error:
        return Section("A law", f"Nothing is fitted: {error} {missing}")
    simple = nearest(cells, losses, asked=grid.cells(held_out))
    predictions = predictions_of(fit, grid, held_out, seeds=seeds, simple=simple)
    worths = worths_of(fit, grid, held_out, fitted, seeds=seeds)
    sentences = [
        f"Held-out {value} of {len(fitted) * len(steps)} cells, means over seeds {_listed(seeds)}, is fitted as"
        f" {_law_in_words(fit)}",
        _signs(fit, cells, losses),
        missing,
        _limits(study, out, arms=list(ages)),
        outcome(predictions, worths),
    ]
    return Section(
        "A law",
        " ".join(filter(None, sentences)),
        _draw(fit, grid, fitted, predictions, seeds=seeds, value=value),
        prediction_table([*predictions, *worths]),
    )


def _check_arms(
    study: Study, ages: dict[str, str | float], held_out: dict[str, list[int]], **_others: object
) -> None:
    for name in (*ages, *held_out):
        if name not in study.arms:
            raise UserError(f"law: {name} is no arm of the study; {nearest_name(name, list(study.arms))}.")
    if unknown := [arm for arm in held_out if arm not in ages]:
        raise UserError(f"law: held_out has {unknown[0]}, of which ages says nothing.")


def _common_seeds(grid: Grid, fitted: dict[str, list[int]]) -> list[int]:
    """List the seeds that all fitted arms have finished; arms with the fewest leave the fit until there are some."""
    # A seed that only some arms have finished would move these alone.
    while fitted:
        if found := set.intersection(*(set(grid.curves[arm].seeds) for arm in fitted)):
            return sorted(found)
        del fitted[min(fitted, key=lambda arm: len(grid.curves[arm].seeds))]
    return []


def _missing(
    study: Study, grid: Grid, *, asked: list[str], fitted: dict[str, list[int]], seeds: list[int]
) -> str:
    """Say which arms and seeds a fit goes without; empty if it has all."""
    said = []
    if absent := [arm for arm in asked if arm not in grid.curves]:
        said.append(f"Without finished runs, the cells of {_listed(absent)} are left out.")
    if short := [arm for arm in asked if arm in grid.curves and arm not in fitted]:
        said.append(
            f"The cells of {_listed(short)} are left out: not measured at all of these steps, or by no seed that the"
            " others have finished."
        )
    for seed in sorted({seed for arm in fitted for seed in study.seeds_of(arm)} - set(seeds)):
        unfinished = [arm for arm in fitted if seed not in grid.curves[arm].seeds]
        said.append(
            f"Seed {seed} is left out of all cells, since it is not finished in {_listed(unfinished)}."
        )
    return " ".join(said)


def _law_in_words(fit: Fit) -> str:
    numbers = []
    for name, number in fit.law.values().items():
        low, high = fit.range_of(name)
        numbers.append(f"{name} {number:.3g} ({low:.3g} to {high:.3g})")
    parameters, tokens, age = fit.law.units
    return (
        f"{fit.law.form}, with an error of {fit.rms:.3f} nats (root of the mean square). In units of {parameters:,.3g}"
        f" parameters, {tokens:,.3g} tokens and an age of {age:,.3g} tokens: {', '.join(numbers)}, in brackets the"
        f" range over fits with cells left out. {_intervals_in_words(fit)} The form is the one with the smaller"
        f" error of left-out cells ({', '.join(f'{form} {one.rms:.3f}' for form, one in fit.left_out.items())}), chosen"
        " by the errors that the intervals are made of, which makes them a little narrow."
    )


def _signs(fit: Fit, cells: Cells, losses: np.ndarray) -> str:
    """Say where fitted cells and forms disagree about who is better."""
    worths = [losses[place] - losses[base] for place, base in pairs_of(cells)]
    ahead = sum(one < 0 for one in worths)
    said = f"Pre-training is ahead of the random start in {ahead} of {len(worths)} fitted cells."
    if ahead < len(worths):
        said += " Both forms have it ahead everywhere, so in the others the law is off."
    if ends := fit.law.at_an_end:
        said += f" At an end of the range that a fit chooses from: {_listed(ends)}."
    return said


def _intervals_in_words(fit: Fit) -> str:
    of_sizes, of_starts = fit.half_widths()
    return (
        f"{COVERAGE:.0%} intervals are +- {of_sizes:.3f} nats at a size that was not fitted, from fits"
        f" without the smallest and without the largest size, and +- {of_starts:.3f} nats at another,"
        f" from fits without the pre-trained arms of a size: Student's t with {len(fit.folds.size)} and"
        f" {len(fit.folds.start)} degrees of freedom, one for each fit."
    )


def _limits(study: Study, out: Path, *, arms: list[str]) -> str:
    """Say what no interval holds."""
    configs = [run_config(study, arm=arm, seed=study.seeds_of(arm)[0], out=out) for arm in arms]
    rates = sorted({config.train.lr for config in configs})
    return (
        "All seeds of an arm begin from the same pre-trained language model, so what another one would give is in no"
        f" interval. All arms are trained at {_listed([f'{rate:g}' for rate in rates])} as learning rate, so what each"
        " would give at a rate of its own is in no interval. No fit leaves out an age everywhere, so what a power of"
        " the age gets wrong between the fitted ages is in no interval."
    )


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(str, names))


def _draw(
    fit: Fit,
    grid: Grid,
    fitted: dict[str, list[int]],
    predictions: list[Prediction],
    *,
    seeds: list[int],
    value: str,
) -> Figure:
    """Draw cells and the law against tokens, and what was predicted beside what was measured."""
    figure, (left, right) = panels(2)
    for (arm, steps), (colour, _) in zip(fitted.items(), styles(), strict=False):
        cells = grid.cells({arm: steps})
        left.plot(cells.tokens, fit.law.predict(cells), color=colour, linewidth=0.9)
        left.plot(
            cells.tokens,
            grid.losses({arm: steps}, seeds=seeds),
            color=colour,
            marker="o" if cells.ages[0] else "x",
            markersize=4,
            linestyle="",
        )
    left.set(xlabel="tokens trained on (x: no pre-training)", ylabel=f"held-out {LABELS.get(value, value)}")
    left.set_xscale("log")
    heights = -np.arange(len(predictions))
    for height, one in zip(heights, predictions, strict=True):
        right.plot([one.low, one.high], [height, height], color="0.6", linewidth=3, solid_capstyle="butt")
        right.plot(one.loss, height, color="0.2", marker="|", markersize=9)
        if one.measured is not None:
            right.plot(one.measured, height, color="#D55E00", marker="o", markersize=4)
    right.set_yticks(heights, [one.name for one in predictions], fontsize=6)
    right.set(xlabel="predicted (grey) and measured (dots)")
    for axis in (left, right):
        finish(axis)
    return figure


SECTIONS = (
    SectionKind(
        "law",
        reads="metrics.jsonl of runs, and of those that made the starts",
        make=law,
        check=_check_arms,
    ),
)
