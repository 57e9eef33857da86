"""Two arms at equal steps, equal tokens and equal total FLOPs, with what came before them charged."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from t2i.errors import UserError
from t2i.report.figures import LABELS, finish, only_point, panels, styles
from t2i.report.sections.section import Section, SectionKind, difference, in_folder, p_value, verdict_on
from t2i.study.results import (
    TRAIN_ROWS,
    Curve,
    Row,
    curve,
    is_rate_falling,
    of_common_seeds,
    read_rows,
    runs_of,
    tokens_spent,
)
from t2i.study.spec import Study, nearest_name
from t2i.study.statistics import paired_test

AXES = {"steps": "optimizer steps", "tokens": "tokens", "flops": "total FLOPs"}


@dataclass(frozen=True)
class Spent:
    """One arm's held-out losses by what had been spent."""

    steps: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    """(T,) each; FLOPs with what is charged."""
    losses: np.ndarray
    """(seeds, T)."""

    def at(self, axis: str, amount: float) -> np.ndarray:
        """Interpolate each seed's loss where so much was spent: (seeds,)."""
        return np.array([np.interp(amount, getattr(self, axis), row) for row in self.losses])


def budgets(
    study: Study,
    out: Path,
    *,
    arms: tuple[str, str],
    charged: dict[str, str | float] | None = None,
    value: str = "image_loss",
) -> Section:
    """Compare two arms at the most steps, tokens and total FLOPs that both have spent.

    Args:
        charged: arm -> what its start cost before: a number of FLOPs, or the folder of the run that made it.
    """
    runs = [runs_of(study, arm=arm, out=out) for arm in arms]
    # Each with all of its own steps: equal tokens or FLOPs are reached at other ones.
    pair = of_common_seeds(*(curve(one, value=value, split="heldout") for one in runs))
    if pair is None:
        return Section("Equal budgets", f"{' and '.join(arms)} have no finished runs of one seed.")
    known = {arm: _charge(cost, out) for arm, cost in (charged or {}).items()}
    spent = [
        _spent(one, flops_per_token=flops_per_token(of_arm[0].rows), charge=known.get(name, 0.0))
        for name, one, of_arm in zip(arms, pair, runs, strict=True)
    ]
    table = [["equal", "at", *arms, "difference", "p", "seeds"]]
    sentences = []
    too_early: set[str] = set()
    for axis, label in AXES.items():
        amount = min(getattr(one, axis)[-1] for one in spent)
        begun = max(getattr(one, axis)[0] for one in spent)
        if amount < begun:
            # One arm's start cost more than the other arm's whole run: there is no common point to compare at.
            costly = max(zip(spent, arms, strict=True), key=lambda one: one[0].flops[0])[1]
            table.append([label, f"{amount:.3g}", *_ends(spent), "none: no equal point", "", ""])
            sentences.append(
                f"at equal {label} nothing can be compared: by its first measurement {costly} had cost"
                f" {begun / amount:.3g} times the whole run of the other"
            )
            continue
        too_early |= {
            name
            for name, one, of_arm in zip(arms, spent, runs, strict=True)
            if amount < getattr(one, axis)[-1] and is_rate_falling(of_arm)
        }
        first, second = (one.at(axis, amount) for one in spent)
        test = paired_test(first.tolist(), second.tolist())
        gap = difference(test.mean, test.low, test.high)
        means = [f"{one.mean():.4f}" for one in (first, second)]
        count = str(test.num_seeds)
        table.append([label, f"{amount:,.6g}", *means, gap, p_value(test.p_value), count])
        sentences.append(
            f"at equal {label} {gap}, p = {p_value(test.p_value)}, {verdict_on(test.verdict, arms[0])}"
        )
    charge = (
        ", ".join(f"{arm}: {cost:.3g} FLOPs before its first step" for arm, cost in known.items()) or "none"
    )
    sentence = f"{arms[0]} - {arms[1]}, held-out {value}: {'; '.join(sentences)}. Charged: {charge}."
    if too_early:
        early = " and ".join(name for name in arms if name in too_early)
        sentence += (
            f" {early} is read before its end at some of these, where its learning rate still falls"
            " (train.min_lr_ratio < 1): a run of that length would end lower."
        )
    return Section("Equal budgets", sentence, _draw(spent, names=arms, value=value), table)


def _check_charged(
    _study: Study,
    *,
    arms: tuple[str, str],
    charged: dict[str, str | float] | None = None,
    **_others: object,
) -> None:
    if unknown := [arm for arm in charged or {} if arm not in arms]:
        raise UserError(f"budgets: charged names arm {unknown[0]}; {nearest_name(unknown[0], list(arms))}.")


def flops_per_token(rows: list[Row]) -> float:
    """Compute the FLOPs of a trained token, as a run's own rows state them."""
    # Both are of one step, so that its duration cancels.
    rates = [
        row.values["flops_per_second"] / row.values["tokens_per_second"]
        for row in rows
        if row.split == TRAIN_ROWS
        and row.values.get("tokens_per_second", 0) > 0
        and "flops_per_second" in row.values
    ]
    return float(np.mean(rates)) if rates else float("nan")


def _charge(cost: str | float, out: Path) -> float:
    """Count what an arm's start cost: as it is stated, or what the run in a folder has spent.

    Raises:
        UserError: it is neither.
    """
    if isinstance(cost, int | float) and cost >= 0:
        return float(cost)
    rows = read_rows(in_folder(str(cost), out))
    if not (spent := tokens_spent(rows)):
        raise UserError(
            f"budgets: charged is {cost!r}; expected FLOPs, or the folder of a run that has trained."
        )
    return spent * flops_per_token(rows)


def _spent(one: Curve, *, flops_per_token: float, charge: float) -> Spent:
    tokens = np.array(one.tokens, dtype=float)
    return Spent(np.array(one.steps, dtype=float), tokens, charge + tokens * flops_per_token, one.values)


def _ends(spent: list[Spent]) -> list[str]:
    return [f"{one.losses[:, -1].mean():.4f} (at its end)" for one in spent]


def _draw(spent: list[Spent], *, names: tuple[str, str], value: str) -> Figure:
    """Draw both arms against tokens, and against total FLOPs."""
    figure, axes = panels(2)
    for axis, (along, label) in zip(
        axes, (("tokens", "tokens trained on"), ("flops", AXES["flops"])), strict=True
    ):
        for one, name, (colour, dash) in zip(spent, names, styles(), strict=False):
            x = getattr(one, along)
            axis.plot(
                x,
                one.losses.mean(0),
                color=colour,
                linestyle=dash,
                label=name,
                marker=only_point(x),
                markersize=3,
            )
            axis.fill_between(x, one.losses.min(0), one.losses.max(0), color=colour, alpha=0.15)
        axis.set(xlabel=label, ylabel=f"held-out {LABELS.get(value, value)}")
        if along == "flops":
            axis.set_xscale("log")  # pre-training may have cost many times the runs
        finish(axis, tokens="x" if along == "tokens" else "")
    return figure


SECTIONS = (
    SectionKind(
        "budgets",
        reads="metrics.jsonl of runs, and of the run that is charged",
        make=budgets,
        check=_check_charged,
    ),
)
