"""A law of the loss in model size, tokens and age of the language model, fitted to cells of finished runs.

A cell is an arm at a step: so many parameters, so many tokens trained on, and a start that had seen so many tokens of
text. What pre-training is worth is fitted in two forms, of which the one that predicts cells left out of the fit better
is taken:

- transferred tokens: loss = E + A n^-alpha + B (d + K d^p n^q a^r)^-beta
- a lower loss:       loss = E + A n^-alpha + B d^-beta - K d^p n^q a^r

with n parameters, d tokens and age a in units of their geometric means, so that A, B and K are nats or multiples there.

Source: Hernandez et al. 2021, Scaling laws for transfer, for the transferred tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import optimize, stats

NAMES = ("E", "A", "alpha", "B", "beta", "K", "p", "q", "r")
COVERAGE = 0.9
"""Of the intervals of predictions."""
LOGS = [NAMES.index(name) for name in ("A", "B", "K")]
"""Fitted as logarithms, since they are positive and of unknown size."""
LOW = np.array([0, -12, 0, -12, 0, -12, -2, -2, 0], dtype=float)
HIGH = np.array([20, 6, 3, 6, 3, 6, 2, 2, 2], dtype=float)
AT_AN_END = 1e-3
"""Nearer to a bound than this, a number is said to be at it."""
LARGEST = 1e6
"""Bound of what a power may become while a fit searches."""
FAR = 1e3
"""Farther apart, as a logarithm, than any two sizes or ages are."""
SEARCH = 200
"""Steps of a fit at most: where few cells are left, a valley may have no end."""
FEWEST_SIZES, FEWEST_AGES = 4, 2
"""Of a fit: without an edge size, three are left for E, A and alpha; K and r take two ages of pre-trained starts."""


@dataclass(frozen=True)
class Cells:
    """Cells of a grid, in one order; (M,) each."""

    parameters: np.ndarray
    tokens: np.ndarray
    ages: np.ndarray
    """Tokens of text before; 0 for a randomly initialised start."""

    def kept(self, mask: np.ndarray) -> "Cells":
        """Keep some cells."""
        return Cells(self.parameters[mask], self.tokens[mask], self.ages[mask])


@dataclass(frozen=True)
class Law:
    """A fitted form."""

    form: str
    theta: np.ndarray
    """(9,) in the order of NAMES, with logarithms of A, B and K."""
    units: tuple[float, float, float]
    """Parameters, tokens and age that count as one."""

    def predict(self, cells: Cells) -> np.ndarray:
        """Compute the loss of cells, (M,)."""
        return FORMS[self.form](self.theta, *_scaled(cells, self.units))

    def worth(self, cells: Cells) -> np.ndarray:
        """Compute the loss of cells less that of a random start at the same size and tokens, (M,)."""
        return self.predict(cells) - self.predict(replace(cells, ages=np.zeros_like(cells.ages)))

    @property
    def at_an_end(self) -> list[str]:
        """Names of the numbers that lie at an end of what a fit may choose."""
        nearest_end = np.minimum(self.theta - LOW, HIGH - self.theta)
        return [name for name, distance in zip(NAMES, nearest_end, strict=True) if distance < AT_AN_END]

    def values(self) -> dict[str, float]:
        """Return every number by name, A, B and K themselves."""
        theta = self.theta.copy()
        theta[LOGS] = np.exp(theta[LOGS])
        return dict(zip(NAMES, theta.tolist(), strict=True))


@dataclass(frozen=True)
class Fold:
    """A fit without some cells, which it then predicts."""

    law: Law
    errors: np.ndarray
    """Measured minus predicted of the cells that were left out."""
    worth_errors: np.ndarray
    """The same of what pre-training is worth in them: of the loss less that of the random start beside it."""


@dataclass(frozen=True)
class LeftOut:
    """Folds of one form, by what is new to their fits."""

    size: list[Fold]
    """All arms of the smallest size are left out, or all of the largest."""
    start: list[Fold]
    """The pre-trained arms of one size are left out."""

    @property
    def rms(self) -> float:
        """The error of all left-out cells, nats."""
        return rms(np.concatenate([fold.errors for fold in (*self.size, *self.start)]))


@dataclass(frozen=True)
class Fit:
    """A law, how well it fits, and what it knows of its own error."""

    law: Law
    sizes: np.ndarray
    """Parameters that were fitted, each once."""
    rms: float
    """Of its own cells, nats."""
    left_out: dict[str, LeftOut]
    """By form."""

    @property
    def folds(self) -> LeftOut:
        """The folds of the form that was taken."""
        return self.left_out[self.law.form]

    def range_of(self, name: str) -> tuple[float, float]:
        """Return the least and the most that one number of the law is in any fold."""
        found = [fold.law.values()[name] for fold in (*self.folds.size, *self.folds.start)]
        return min(found), max(found)

    def predicted(self, cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict cells: the loss and the bounds of its interval, (M,) each.

        The error of a cell whose size was not fitted is that of left-out edge sizes, as it lies beyond an edge itself.
        The error of another cell is that of left-out pre-trained arms.
        """
        return self._interval(self.law.predict(cells), cells, key="errors")

    def predicted_worth(self, cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict the loss of pre-trained cells less that of the random start at the same size and tokens, likewise."""
        return self._interval(self.law.worth(cells), cells, key="worth_errors")

    def half_widths(self, key: Literal["errors", "worth_errors"] = "errors") -> tuple[float, float]:
        """Compute the halves of intervals at a size that was not fitted, and at another, nats."""
        of_sizes, of_starts = (
            [getattr(fold, key) for fold in folds] for folds in (self.folds.size, self.folds.start)
        )
        return half_width(of_sizes), half_width(of_starts)

    def _interval(
        self, middle: np.ndarray, cells: Cells, *, key: Literal["errors", "worth_errors"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of_sizes, of_starts = self.half_widths(key)
        half = np.where(np.isin(cells.parameters, self.sizes), of_starts, of_sizes)
        return middle, middle - half, middle + half


def half_width(folds: list[np.ndarray]) -> float:
    """Compute the half of an interval, nats, by Student's t, from the errors of each fold."""
    # Cells of a fold err together, so a fold is one observation, however many cells it has. No mean of the errors is
    # taken, so each counts whole.
    found = np.array([rms(errors) for errors in folds if len(errors)])
    quantile = float(stats.t.ppf((1 + COVERAGE) / 2, len(found)))
    return quantile * rms(found) if len(found) else np.nan


def fit_law(cells: Cells, losses: np.ndarray) -> Fit:
    """Fit both forms to losses (M,), and take the one that predicts left-out cells better.

    Raises:
        ValueError: the numbers of a law cannot be told from so few sizes or ages.
    """
    sizes, ages = np.unique(cells.parameters), np.unique(cells.ages[cells.ages > 0])
    if len(sizes) < FEWEST_SIZES or len(ages) < FEWEST_AGES:
        raise ValueError(
            f"{len(sizes)} sizes and {len(ages)} ages of pre-trained starts; expected at least {FEWEST_SIZES} and"
            f" {FEWEST_AGES}."
        )
    units = (_centre(cells.parameters), _centre(cells.tokens), _centre(cells.ages[cells.ages > 0]))
    left_out = {form: _left_out(form, cells, losses, units) for form in FORMS}
    law = _fitted(min(left_out, key=lambda form: left_out[form].rms), cells, losses, units)
    return Fit(law, sizes, rms(losses - law.predict(cells)), left_out)


def pairs_of(cells: Cells) -> list[tuple[int, int]]:
    """Pair pre-trained cells with those of a random start at the same size and tokens, by their places."""
    bases = {
        (cells.parameters[place], cells.tokens[place]): place
        for place in np.flatnonzero(cells.ages == 0).tolist()
    }
    return [
        (place, bases[beside])
        for place in np.flatnonzero(cells.ages > 0).tolist()
        if (beside := (cells.parameters[place], cells.tokens[place])) in bases
    ]


def nearest(cells: Cells, losses: np.ndarray, *, asked: Cells) -> np.ndarray:
    """Predict each cell that is asked for by the loss of the nearest one, (M,): what a law must do better than.

    The nearest is of a random start for a random start, of the same tokens where there are some, then by the factor
    between sizes and ages.
    """

    def logs(some: Cells) -> np.ndarray:
        ages = np.where(some.ages > 0, np.log(np.maximum(some.ages, 1.0)), -FAR)
        return np.stack([np.log(some.parameters), FAR * np.log(some.tokens), ages], axis=1)

    distances = np.abs(logs(asked)[:, None] - logs(cells)[None]).sum(-1)
    return np.asarray(losses[distances.argmin(1)])


def _transferred(theta: np.ndarray, n: np.ndarray, d: np.ndarray, a: np.ndarray) -> np.ndarray:
    floor, size, alpha, data, beta, *_ = theta
    return floor + np.exp(size) * n**-alpha + np.exp(data) * (d + _worth(theta, n, d, a)) ** -beta


def _lower(theta: np.ndarray, n: np.ndarray, d: np.ndarray, a: np.ndarray) -> np.ndarray:
    floor, size, alpha, data, beta, *_ = theta
    return floor + np.exp(size) * n**-alpha + np.exp(data) * d**-beta - _worth(theta, n, d, a)


def _worth(theta: np.ndarray, n: np.ndarray, d: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Compute K d^p n^q a^r, nothing where the age is 0."""
    _, _, _, _, _, scale, p, q, r = theta
    known = np.where(a > 0, a, 1.0)
    return np.where(a > 0, np.minimum(np.exp(scale) * d**p * n**q * known**r, LARGEST), 0.0)


FORMS: dict[str, Callable[..., np.ndarray]] = {"transferred tokens": _transferred, "a lower loss": _lower}


def _left_out(form: str, cells: Cells, losses: np.ndarray, units: tuple[float, float, float]) -> LeftOut:
    """Fit without some cells, and predict them."""
    beside = pairs_of(cells)

    def fold(is_out: np.ndarray) -> Fold:
        law = _fitted(form, cells.kept(~is_out), losses[~is_out], units)
        residuals = losses - law.predict(cells)
        pairs = [(place, base) for place, base in beside if is_out[place]]
        worths = np.array([residuals[place] - residuals[base] for place, base in pairs])
        return Fold(law, residuals[is_out], worths)

    of_sizes = [cells.parameters == size for size in np.unique(cells.parameters)]
    pretrained = [is_size & (cells.ages > 0) for is_size in of_sizes]
    return LeftOut(
        # Edges alone: a size between others is predicted more easily than one beyond them.
        size=[fold(of_sizes[0]), fold(of_sizes[-1])],
        # All of a size together: they share what the law gets wrong at that size.
        start=[fold(is_out) for is_out in pretrained if is_out.any()],
    )


def _fitted(form: str, cells: Cells, losses: np.ndarray, units: tuple[float, float, float]) -> Law:
    """Fit from several starts, as the sum of squares has more than one valley."""
    least, scaled = float(losses.min()), _scaled(cells, units)
    starts = [
        np.array([share * least, np.log(0.2 * least), 0.3, np.log(0.5 * least), 0.4, scale, 0.2, 0.0, 0.3])
        for share in (0.1, 0.6)
        for scale in (-3.0, 0.0)
    ]
    fits = [
        optimize.least_squares(
            lambda theta: FORMS[form](theta, *scaled) - losses,
            np.clip(start, LOW, HIGH),
            bounds=(LOW, HIGH),
            max_nfev=SEARCH,
        )
        for start in starts
    ]
    return Law(form, min(fits, key=lambda fit: fit.cost).x, units)


def _scaled(cells: Cells, units: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parameters, tokens, age = units
    return cells.parameters / parameters, cells.tokens / tokens, cells.ages / age


def _centre(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))


def rms(errors: np.ndarray) -> float:
    """Compute the root of the mean square."""
    return float(np.sqrt((errors**2).mean()))
