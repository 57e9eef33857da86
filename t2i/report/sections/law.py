"""A law of model size, tokens and age of the language model, and whether it predicts cells that it has not seen."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from t2i.errors import UserError
from t2i.report.figures import LABELS, finish, panels, styles
from t2i.report.sections.section import Section, SectionKind, in_folder
from t2i.study.cost import run_costs
from t2i.study.jobs import run_name, step_config
from t2i.study.law import COVERAGE, Cells, Fit, fit_law
from t2i.study.results import Curve, curve, read_rows, runs_of, tokens_spent
from t2i.study.spec import TRAIN, Study, nearest_name


@dataclass(frozen=True)
class Grid:
    """Arms by what the law knows of them, and their held-out losses."""

    parameters: dict[str, float]
    """FLOPs of a trained token over 6."""
    ages: dict[str, float]
    curves: dict[str, Curve]
    """Of arms with finished runs."""

    def cells(self, arms: dict[str, list[int]]) -> Cells:
        """Make cells of arms at steps."""
        places = [(arm, step) for arm, steps in arms.items() for step in steps]
        tokens = self.tokens()
        return Cells(
            [arm for arm, _ in places],
            np.array([self.parameters[arm] for arm, _ in places]),
            np.array([float(tokens[step]) for _, step in places]),
            np.array([self.ages[arm] for arm, _ in places]),
        )

    def losses(self, arms: dict[str, list[int]]) -> np.ndarray:
        """Collect the losses of cells, (seeds, M)."""
        columns = [
            self.curves[arm].values[:, self.curves[arm].steps.index(step)]
            for arm, steps in arms.items()
            for step in steps
        ]
        return np.stack(columns, axis=1)

    def tokens(self) -> dict[int, int]:
        """Map measured steps to tokens."""
        # Of any arm: all see the same sequences in the same order.
        one = next(iter(self.curves.values()))
        return dict(zip(one.steps, one.tokens, strict=True))


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

    Without finished runs of the held-out arms it says what is predicted of them.

    Args:
        ages: arm -> tokens of text that its start had seen, or the folder of the run that made it, such as that of a
            step of the study; 0 for none.
        steps: those of the fitted cells.
        held_out: arm -> steps; these arms are not fitted.
    """
    _check_arms(study, ages, held_out)
    grid = _grid(study, out, ages=ages, value=value)
    fitted = {arm: steps for arm in ages if arm not in held_out and _has(grid, arm, steps)}
    if missing := [arm for arm in ages if arm not in held_out and arm not in fitted]:
        return Section(
            "A law", f"Nothing is fitted: {', '.join(missing)} have no finished runs at steps {steps}."
        )
    known = grid.tokens()
    if unknown := sorted({step for steps in held_out.values() for step in steps} - known.keys()):
        raise UserError(f"law: held_out has step {unknown[0]}; measured are {', '.join(map(str, known))}.")
    cells = grid.cells(fitted)
    try:
        fit = fit_law(cells, grid.losses(fitted))
    except ValueError as error:
        return Section("A law", f"Nothing is fitted: {error}")
    predictions = _predictions(fit, grid, held_out)
    sentence = f"{_law_in_words(fit, len(cells.arms), value)} {_outcome(predictions)}"
    return Section("A law", sentence, _draw(fit, grid, fitted, predictions, value), _table(predictions))


@dataclass(frozen=True)
class Prediction:
    """One held-out cell."""

    arm: str
    step: int
    parameters: float
    tokens: float
    age: float
    loss: float
    low: float
    high: float
    measured: float | None
    """The mean over seeds; None before its runs are done."""

    @property
    def is_inside(self) -> bool:
        """Whether what was measured lies in the interval."""
        return self.measured is not None and self.low <= self.measured <= self.high


def _check_arms(study: Study, ages: dict[str, str | float], held_out: dict[str, list[int]]) -> None:
    for name in (*ages, *held_out):
        if name not in study.arms:
            raise UserError(f"law: {name} is no arm of the study; {nearest_name(name, list(study.arms))}.")
    if unknown := [arm for arm in held_out if arm not in ages]:
        raise UserError(f"law: held_out has {unknown[0]}, of which ages says nothing.")


def _grid(study: Study, out: Path, *, ages: dict[str, str | float], value: str) -> Grid:
    costs = {one.name: one for one in run_costs(study, out=out)}
    own = {arm: costs[run_name(arm, study.seeds_of(arm)[0])] for arm in ages}
    # By plan, done or not: cells are predicted before the steps that only these cells need.
    planned = {
        step_config(step, out=out).run_dir: costs[step.name].tokens
        for step in study.steps
        if step.command == TRAIN
    }
    curves = {arm: curve(runs_of(study, arm=arm, out=out), value=value, split="heldout") for arm in ages}
    return Grid(
        parameters={arm: one.flops / one.tokens / 6 for arm, one in own.items()},
        ages={arm: _age(age, out, planned=planned) for arm, age in ages.items()},
        curves={arm: one for arm, one in curves.items() if one is not None},
    )


def _age(age: str | float, out: Path, *, planned: dict[Path, int]) -> float:
    if isinstance(age, int | float):
        return float(age)
    folder = in_folder(age, out)
    if folder in planned:
        return float(planned[folder])
    if not (spent := tokens_spent(read_rows(folder))):
        raise UserError(f"law: {folder} is no run that has trained; ages names it.")
    return float(spent)


def _has(grid: Grid, arm: str, steps: list[int]) -> bool:
    return arm in grid.curves and set(steps) <= set(grid.curves[arm].steps)


def _predictions(fit: Fit, grid: Grid, held_out: dict[str, list[int]]) -> list[Prediction]:
    cells = grid.cells(held_out)
    places = [(arm, step) for arm, steps in held_out.items() for step in steps]
    known = [
        float(grid.losses({arm: [step]}).mean()) if _has(grid, arm, [step]) else None for arm, step in places
    ]
    loss, low, high = fit.predicted(cells)
    return [
        Prediction(
            arm,
            step,
            parameters=float(cells.parameters[cell]),
            tokens=float(cells.tokens[cell]),
            age=float(cells.ages[cell]),
            loss=float(loss[cell]),
            low=float(low[cell]),
            high=float(high[cell]),
            measured=known[cell],
        )
        for cell, (arm, step) in enumerate(places)
    ]


def _law_in_words(fit: Fit, count: int, value: str) -> str:
    numbers = []
    for name, number in fit.law.values().items():
        low, high = fit.interval(name)
        numbers.append(f"{name} {number:.3g} ({low:.3g} to {high:.3g})")
    errors = ", ".join(f"{form} {error:.3f}" for form, error in fit.left_out_rms().items())
    parameters, tokens, age = fit.law.units
    return (
        f"Held-out {value} of {count} cells is fitted as {fit.law.form}, with an error of {fit.rms:.3f} nats (root of"
        f" the mean square). Arms left out of the fit are predicted with an error of: {errors}. In units of"
        f" {parameters:,.3g} parameters, {tokens:,.3g} tokens and an age of {age:,.3g} tokens: {', '.join(numbers)},"
        f" with {COVERAGE:.0%} intervals over seeds."
    )


def _outcome(predictions: list[Prediction]) -> str:
    known = [one for one in predictions if one.measured is not None]
    if not known:
        return f"{len(predictions)} held-out cells are predicted; none was run yet."
    inside = sum(one.is_inside for one in known)
    rest = len(predictions) - len(known)
    return f"Of {len(known)} held-out cells, {inside} fell into their {COVERAGE:.0%} intervals" + (
        f"; {rest} were not run yet." if rest else "."
    )


def _table(predictions: list[Prediction]) -> list[list[str]]:
    head = [
        "held-out cell",
        "parameters",
        "tokens",
        "age",
        "predicted",
        f"{COVERAGE:.0%} interval",
        "measured",
        "",
    ]
    return [head] + [
        [
            f"{one.arm}, step {one.step}",
            *(f"{amount:,.3g}" for amount in (one.parameters, one.tokens, one.age)),
            f"{one.loss:.3f}",
            f"{one.low:.3f} to {one.high:.3f}",
            "not run" if one.measured is None else f"{one.measured:.3f}",
            "" if one.measured is None else ("inside" if one.is_inside else "outside"),
        ]
        for one in predictions
    ]


def _draw(
    fit: Fit, grid: Grid, fitted: dict[str, list[int]], predictions: list[Prediction], value: str
) -> Figure:
    """Draw cells and the law against tokens, and what was predicted beside what was measured."""
    figure, (left, right) = panels(2)
    for (arm, steps), (colour, _) in zip(fitted.items(), styles(), strict=False):
        cells = grid.cells({arm: steps})
        left.plot(cells.tokens, fit.law.predict(cells), color=colour, linewidth=0.9)
        left.plot(
            cells.tokens,
            grid.losses({arm: steps}).mean(0),
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
    right.set_yticks(heights, [f"{one.arm}, {one.step}" for one in predictions], fontsize=6)
    right.set(xlabel="predicted (grey) and measured (dots)")
    for axis in (left, right):
        finish(axis)
    return figure


SECTIONS = (SectionKind("law", reads="metrics.jsonl of runs, and of those that made the starts", make=law),)
