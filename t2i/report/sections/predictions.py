"""What a law predicts of held-out cells, beside what came: their losses, and what pre-training is worth in them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from t2i.report.sections.grid import Grid, places_of
from t2i.study.law import COVERAGE, Cells, Fit, pairs_of, rms


@dataclass(frozen=True)
class Prediction:
    """One held-out cell, or what pre-training is worth there."""

    name: str
    arm: str
    parameters: float
    tokens: float
    age: float
    loss: float
    low: float
    high: float
    simple: float
    """What the nearest fitted cell says; nan for a worth."""
    measured: float | None
    """The mean over the seeds of the fit; None before all of them are finished."""

    @property
    def is_inside(self) -> bool:
        """Whether what was measured lies in the interval."""
        return self.measured is not None and self.low <= self.measured <= self.high


def predictions_of(
    fit: Fit, grid: Grid, held_out: dict[str, list[int]], *, seeds: list[int], simple: np.ndarray
) -> list[Prediction]:
    """Predict held-out cells.

    Args:
        seeds: those that the fit's losses are means over.
        simple: the losses of the nearest fitted cells, (M,).
    """
    cells = grid.cells(held_out)
    found = fit.predicted(cells)
    return [
        _prediction(
            f"{arm}, step {step}",
            arm,
            cells,
            cell,
            found=found,
            simple=float(simple[cell]),
            measured=_measured(grid, arm, step, seeds=seeds),
        )
        for cell, (arm, step) in enumerate(places_of(held_out))
    ]


def worths_of(
    fit: Fit, grid: Grid, held_out: dict[str, list[int]], fitted: dict[str, list[int]], *, seeds: list[int]
) -> list[Prediction]:
    """Predict what pre-training is worth in held-out cells that have a random start beside them.

    What a law gets wrong of a size is in both, so a worth is predicted more narrowly than a loss.
    """
    arms = {**fitted, **held_out}
    places, cells = places_of(arms), grid.cells(arms)
    found, worths = fit.predicted_worth(cells), []
    for cell, base in pairs_of(cells):
        (arm, step), other = places[cell], places[base][0]
        if arm not in held_out or np.isnan(found[1][cell]):
            continue
        ends = [_measured(grid, one, step, seeds=seeds) for one in (arm, other)]
        measured = None if ends[0] is None or ends[1] is None else ends[0] - ends[1]
        name = f"{arm} - {other}, step {step}"
        worths.append(_prediction(name, arm, cells, cell, found=found, simple=np.nan, measured=measured))
    return worths


def _prediction(
    name: str,
    arm: str,
    cells: Cells,
    cell: int,
    *,
    found: tuple[np.ndarray, np.ndarray, np.ndarray],
    simple: float,
    measured: float | None,
) -> Prediction:
    loss, low, high = (float(values[cell]) for values in found)
    parameters, tokens, age = (float(values[cell]) for values in (cells.parameters, cells.tokens, cells.ages))
    return Prediction(name, arm, parameters, tokens, age, loss, low, high, simple, measured)


def _measured(grid: Grid, arm: str, step: int, *, seeds: list[int]) -> float | None:
    return float(grid.losses({arm: [step]}, seeds=seeds)[0]) if grid.has(arm, step, seeds=seeds) else None


def outcome(predictions: list[Prediction], worths: list[Prediction]) -> str:
    """Say how many cells and worths fell into their intervals."""
    known = [one for one in predictions if one.measured is not None]
    if not known:
        return f"{len(predictions)} held-out cells are predicted; none is finished yet."
    sizes = {one.parameters for one in known}
    outside = {one.parameters for one in known if not one.is_inside}
    rest = len(predictions) - len(known)
    said = (
        f"Of {len(predictions)} held-out cells, {sum(one.is_inside for one in known)} fell into their {COVERAGE:.0%}"
        f" intervals"
        + (f" and {rest} are not finished" if rest else "")
        + f"; of {len(sizes)} sizes, {len(sizes - outside)} did with every finished cell, and cells of one size err"
        f" together. The law's error there is {_error(known, 'loss')} nats (root of the mean square), that of the"
        f" nearest fitted cell {_error(known, 'simple')}."
    )
    if of_worth := [one for one in worths if one.measured is not None]:
        said += (
            f" Of {len(worths)} differences to the random start, {sum(one.is_inside for one in of_worth)} fell into"
            f" theirs; {sum(one.low <= 0 <= one.high for one in worths)} of these intervals hold no difference as well."
            f" The law's error of a difference is {_error(of_worth, 'loss')} nats, that of no difference"
            f" {_error(of_worth, None)}."
        )
    return said


def _error(known: list[Prediction], key: Literal["loss", "simple"] | None) -> str:
    """Compute the error of a prediction, nats; without a key that of 0."""
    errors = [(one.measured or 0.0) - (getattr(one, key) if key else 0.0) for one in known]
    return f"{rms(np.array(errors)):.3f}"


def prediction_table(predictions: list[Prediction]) -> list[list[str]]:
    """Tabulate predictions beside what came."""
    head = [
        "held-out cell",
        "parameters",
        "tokens",
        "age",
        "predicted",
        f"{COVERAGE:.0%} interval",
        "nearest fitted cell",
        "measured",
        "",
    ]
    return [head] + [
        [
            one.name,
            *(f"{amount:,.3g}" for amount in (one.parameters, one.tokens, one.age)),
            f"{one.loss:.3f}",
            f"{one.low:.3f} to {one.high:.3f}",
            "" if np.isnan(one.simple) else f"{one.simple:.3f}",
            "not finished" if one.measured is None else f"{one.measured:.3f}",
            "" if one.measured is None else ("inside" if one.is_inside else "outside"),
        ]
        for one in predictions
    ]
