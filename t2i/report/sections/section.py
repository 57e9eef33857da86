"""A part of a study's report."""

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
