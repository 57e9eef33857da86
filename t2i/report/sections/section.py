"""A section of a study's report, and its formats for numbers, which may be unknown (nan)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from t2i.study.results import Curve


@dataclass
class Section:
    """A part of the report."""

    title: str
    found: str
    """One sentence, made from the numbers."""
    figure: Figure | None = None
    """None for a section that is a table."""
    table: list[list[str]] = field(default_factory=list)
    """Its first row is the header."""
    paper: str = ""
    """What the paper found, from the study file."""


@dataclass(frozen=True)
class SectionKind:
    """What a study file can ask for under `report`."""

    name: str
    """Its name under `section`."""
    reads: str
    """Files that it is made from, for the documentation."""
    make: Callable[..., Section]
    """Called with the study, its folder, and the entry's arguments by keyword."""
    check: Callable[..., None] | None = None
    """Called before anything runs, with the study and these arguments: raises UserError for a name that is none."""


def in_folder(path: str, out: Path) -> Path:
    """Put the study's folder into a path of the study file."""
    return Path(path.replace("{out}", str(out)))


def last(one: Curve | None) -> str:
    """Format the mean over seeds of the last value, with the range of seeds."""
    if one is None:
        return "-"
    last = one.values[:, -1]
    # The range and not a deviation: of two or three seeds the range is all that there is to see.
    return f"{last.mean():.4f}" + (f" ({last.min():.4f} to {last.max():.4f})" if len(last) > 1 else "")


def files_in(files: dict[str, str], out: Path) -> dict[str, Path]:
    """Put the study's folder into named paths of the study file."""
    return {name: in_folder(file, out) for name, file in files.items()}


def without_empty_columns(table: list[list[str]]) -> list[list[str]]:
    """Drop columns that are empty below the header."""
    # "-" is what `last` writes for a value that no run has, such as the held-out total.
    kept = [place for place in range(len(table[0])) if any(row[place] != "-" for row in table[1:])]
    return [[row[place] for place in kept] for row in table]


def interval(low: float, high: float, form: str) -> str:
    """Format a 95% interval's bounds, in a format such as "{:.3f}"."""
    if math.isnan(low):
        return "(one seed: no interval)"
    return f"(95%: {form.format(low)} to {form.format(high)})"


def difference(mean: float, low: float, high: float) -> str:
    """Format a mean difference with its 95% interval."""
    return f"{mean:+.4f} {interval(low, high, '{:+.4f}')}"


def known(value: float) -> str:
    """Format a quantity, which may be unknown."""
    return "an unknown number of" if math.isnan(value) else f"{value:.4f}"


def p_value(value: float) -> str:
    """Format a p-value."""
    return "unknown" if math.isnan(value) else f"{value:.3g}"


def verdict_on(verdict: str, name: str) -> str:
    """Describe the verdict of a test on losses, where lower is better."""
    sentences = {"lower": f"{name} is better", "higher": f"{name} is worse"}
    return sentences.get(verdict, verdict)
