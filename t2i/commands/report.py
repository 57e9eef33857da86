"""Write a run's report.html: curves, images, scores with their reference rows, settings.

Examples:
  python launchers/report.py runs/train
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from t2i.cli import parse


@dataclass(frozen=True)
class ReportCommand:
    """The run."""

    run: tyro.conf.Positional[Path]
    """A run folder."""


def main() -> None:
    command = parse(ReportCommand, description=__doc__ or "")
    from t2i.report.run import write_report

    print(f"Open {write_report(command.run)} in a browser.")
