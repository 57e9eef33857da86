"""A part of a study's report, and how it writes numbers, which may be unknown, as nan is."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i.study.results import Curve, read_json


@dataclass
class Section:
    """A part of the report."""

    title: str
    found: str
    """One sentence, made from the numbers."""
    figure: Any = None
    """A matplotlib figure; None for a section that is a table."""
    table: list[list[str]] = field(default_factory=list)
    """Its first row is the head."""
    paper: str = ""
    """What the paper found, as the study file says."""


def last(one: Curve | None) -> str:
    """Write the mean over seeds of the last value, with the range of seeds."""
    if one is None:
        return "-"
    last = one.values[:, -1]
    return f"{last.mean():.4f}" + (f" ({last.min():.4f} to {last.max():.4f})" if len(last) > 1 else "")


def read_files(files: dict[str, str], *, out: Path) -> dict[str, dict[str, Any]]:
    """Read named JSON files, `{out}` in their paths being the study's folder; those that are not there are left out."""
    found = {name: read_json(Path(file.replace("{out}", str(out)))) for name, file in files.items()}
    return {name: one for name, one in found.items() if one}


def without_empty_columns(table: list[list[str]]) -> list[list[str]]:
    """Drop columns that no row below the head fills."""
    kept = [place for place in range(len(table[0])) if any(row[place] != "-" for row in table[1:])]
    return [[row[place] for place in kept] for row in table]


def interval(low: float, high: float, form: str) -> str:
    """Write a 95% interval's bounds in a format such as "{:.3f}"."""
    if math.isnan(low):
        return "(one seed: no interval)"
    return f"(95%: {form.format(low)} to {form.format(high)})"


def difference(mean: float, low: float, high: float) -> str:
    """Write a mean difference with its 95% interval."""
    return f"{mean:+.4f} {interval(low, high, '{:+.4f}')}"


def known(value: float) -> str:
    """Write a number of something, or that it is not known."""
    return "an unknown number of" if math.isnan(value) else f"{value:.4f}"


def p_value(value: float) -> str:
    """Write a p-value."""
    return "unknown" if math.isnan(value) else f"{value:.3g}"


def verdict_on(verdict: str, name: str) -> str:
    """Say what a test on losses found, where lower is better."""
    sentences = {"lower": f"{name} is better", "higher": f"{name} is worse"}
    return sentences.get(verdict, verdict)
