"""A law of the loss in model size, tokens and age of the language model, fitted to cells of finished runs.

A cell is an arm at a step: so many parameters, so many tokens trained on, and a start that had seen so many tokens of
text. What pre-training is worth is fitted in two forms, of which the one that predicts arms left out of the fit better
is taken:

- transferred tokens: loss = E + A n^-alpha + B (d + K d^p n^q a^r)^-beta
- a lower loss:       loss = E + A n^-alpha + B d^-beta - K d^p n^q a^r

with n parameters, d tokens and age a in units of their geometric means, so that A, B and K are nats or multiples there.

Source: Hernandez et al. 2021, Scaling laws for transfer, for the transferred tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize

NAMES = ("E", "A", "alpha", "B", "beta", "K", "p", "q", "r")
DRAWS = 200
COVERAGE = 0.9
"""Of the intervals of predictions."""
LOGS = [NAMES.index(name) for name in ("A", "B", "K")]
"""Fitted as logarithms, since they are positive and of unknown size."""
LOW = np.array([0, -12, 0, -12, 0, -12, -2, -2, 0], dtype=float)
HIGH = np.array([20, 6, 3, 6, 3, 6, 2, 2, 2], dtype=float)
LARGEST = 1e6
"""Bound of what a power may become while a fit searches."""


@dataclass(frozen=True)
class Cells:
    """Cells of a grid, in one order; (M,) each."""

    arms: list[str]
    parameters: np.ndarray
    tokens: np.ndarray
    ages: np.ndarray
    """Tokens of text before; 0 for a randomly initialised start."""

    def kept(self, which: np.ndarray) -> "Cells":
        """Keep some cells, by a mask or by places."""
        places = np.arange(len(self.arms))[which]
        return Cells(
            [self.arms[place] for place in places],
            self.parameters[places],
            self.tokens[places],
            self.ages[places],
        )


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

    def values(self) -> dict[str, float]:
        """Return every number by name, A, B and K themselves."""
        theta = self.theta.copy()
        theta[LOGS] = np.exp(theta[LOGS])
        return dict(zip(NAMES, theta.tolist(), strict=True))


@dataclass(frozen=True)
class Fit:
    """A law, how well it fits, and what it knows of its own error."""

    law: Law
    draws: list[Law]
    """The same form fitted to seeds drawn with replacement."""
    rms: float
    """Of its own cells, nats."""
    left_out: dict[str, np.ndarray]
    """Form -> measured minus predicted of each cell, when its arm was left out of the fit; (M,)."""

    def left_out_rms(self) -> dict[str, float]:
        """Say how well each form predicts arms that it has not seen."""
        return {form: _rms(errors) for form, errors in self.left_out.items()}

    def interval(self, name: str) -> tuple[float, float]:
        """Return the interval of one number of the law over the draws."""
        low, high = _quantiles(np.array([law.values()[name] for law in self.draws]))
        return float(low), float(high)

    def predicted(self, cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict cells: the loss and the bounds of its interval, (M,) each.

        An interval holds what seeds do to the fit, and the errors of arms that were left out: what the form itself gets
        wrong is most of it.
        """
        random = np.random.default_rng(0)
        errors = self.left_out[self.law.form]
        drawn = np.array([law.predict(cells) for law in self.draws])  # (draws, M)
        low, high = _quantiles(drawn + random.choice(errors, size=drawn.shape))
        return self.law.predict(cells), low, high


def fit_law(cells: Cells, losses: np.ndarray) -> Fit:
    """Fit both forms to losses (seeds, M), and take the one that predicts left-out arms better.

    Raises:
        ValueError: there are fewer arms than numbers to fit can be told from, or no pre-trained one.
    """
    if len(cells.arms) <= len(NAMES) or len(set(cells.arms)) < 3 or not (cells.ages > 0).any():
        raise ValueError(
            f"{len(cells.arms)} cells of {len(set(cells.arms))} arms; expected more than {len(NAMES)} cells, of three"
            " arms or more, of which some are pre-trained."
        )
    units = (_centre(cells.parameters), _centre(cells.tokens), _centre(cells.ages[cells.ages > 0]))
    means = losses.mean(0)
    laws = {form: _fitted(form, cells, means, units) for form in FORMS}
    left_out = {form: _left_out(law, cells, means) for form, law in laws.items()}
    law = laws[min(laws, key=lambda form: _rms(left_out[form]))]
    random = np.random.default_rng(0)
    # Seeds are drawn for all cells together: what a seed does, it does to all arms alike.
    draws = [
        _refitted(law, cells, losses[random.integers(len(losses), size=len(losses))].mean(0))
        for _ in range(DRAWS)
    ]
    return Fit(law, draws, _rms(means - law.predict(cells)), left_out)


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


def _fitted(form: str, cells: Cells, means: np.ndarray, units: tuple[float, float, float]) -> Law:
    """Fit from several starts, as the sum of squares has more than one valley."""
    least = float(means.min())
    starts = [
        np.array([share * least, np.log(0.2 * least), 0.3, np.log(0.5 * least), beta, scale, 0.2, 0.0, 0.3])
        for share in (0.1, 0.6)
        for beta in (0.2, 0.8)
        for scale in (-3.0, 0.0)
    ]
    laws = [_refitted(Law(form, start, units), cells, means) for start in starts]
    return min(laws, key=lambda law: _rms(means - law.predict(cells)))


def _refitted(law: Law, cells: Cells, means: np.ndarray) -> Law:
    """Fit again from where a law is."""
    scaled = _scaled(cells, law.units)
    found = optimize.least_squares(
        lambda theta: FORMS[law.form](theta, *scaled) - means,
        np.clip(law.theta, LOW, HIGH),
        bounds=(LOW, HIGH),
    )
    return replace(law, theta=found.x)


def _left_out(law: Law, cells: Cells, means: np.ndarray) -> np.ndarray:
    """Predict each arm by a fit to the others; measured minus predicted, (M,)."""
    errors = np.empty(len(means))
    for arm in dict.fromkeys(cells.arms):
        is_own = np.array([name == arm for name in cells.arms])
        others = _fitted(law.form, cells.kept(~is_own), means[~is_own], law.units)
        errors[is_own] = means[is_own] - others.predict(cells.kept(is_own))
    return errors


def _scaled(cells: Cells, units: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parameters, tokens, age = units
    return cells.parameters / parameters, cells.tokens / tokens, cells.ages / age


def _centre(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))


def _rms(errors: np.ndarray) -> float:
    return float(np.sqrt((errors**2).mean()))


def _quantiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
    return low, high
