"""Write a run's report.html: curves, images, scores with their reference rows, settings.

Examples:
  python launchers/report.py runs/train
  python launchers/report.py runs/train --every 60
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge, Le

from t2i.cli import parse


@dataclass(frozen=True)
class ReportCommand:
    """The run."""

    run: tyro.conf.Positional[Path]
    """A run folder."""
    every: Annotated[int, Ge(0), Le(86_400)] = 0
    """Seconds between pages while the run lasts, which an open browser shows by itself; 0 for one page."""


def main() -> None:
    command = parse(ReportCommand, description=__doc__ or "")
    from t2i.report.run import follow_run, write_report

    if command.every:
        print(
            f"Open {command.run / 'report.html'} in a browser; it is written every {command.every} s.",
            flush=True,
        )
        follow_run(command.run, every_seconds=command.every)
    print(f"Open {write_report(command.run)} in a browser.")
