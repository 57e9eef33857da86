"""A run that is watched: curves, grids of samples, what it costs and when it ends."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from t2i.files import check_keys
from t2i.report.figures import loss_curves
from t2i.runs.checkpoint_manifest import committed, has_manifest, read_checkpoint_manifest, steps_of
from t2i.runs.metrics_log import METRICS, has_step
from t2i.runs.run_folder import RESOLVED, SAMPLES, STATUS, read_sample_captions, read_settings, read_status
from t2i.study.results import TRAIN_ROWS, Row, image_baselines, read_run

RECENT_STEPS = 50
"""The last steps, whose pace is taken for that of the rest."""


@dataclass(frozen=True)
class Forecast:
    """How far a run is, and what is left of it."""

    state: str
    step: int
    max_steps: int
    seconds: float
    """Spent in steps so far."""
    seconds_left: float | None
    """At the pace of the last steps; None where no pace is known."""
    num_ranks: int
    price: float
    """US dollars per GPU-hour; 0 where nobody named it."""

    @property
    def hours(self) -> float:
        """Hours of all its steps, by this pace."""
        return (self.seconds + (self.seconds_left or 0)) / 3600

    def lines(self, *, now: float) -> list[str]:
        """Say it, a sentence per line.

        Args:
            now: seconds since 1970.
        """
        device_hours = self.hours * self.num_ranks
        said = [
            f"{self.state}: step {self.step:,} of {self.max_steps:,}, {_span(self.seconds)} in steps so far."
        ]
        if self.state == "running" and self.seconds_left is not None:
            end = time.strftime("%A %H:%M", time.localtime(now + self.seconds_left))
            said.append(
                f"{_span(self.seconds_left)} are left at the pace of the last {RECENT_STEPS} steps: until {end},"
                " without evaluations and saves."
            )
        whole = "It takes" if self.state == "running" else "It took"
        ranks = "process" if self.num_ranks == 1 else "processes"
        cost = f", {device_hours * self.price:,.2f} US dollars" if self.price else ""
        said.append(f"{whole} {device_hours:,.2f} device-hours on {self.num_ranks} {ranks}{cost}.")
        return said


@dataclass(frozen=True)
class Watched:
    """All that the page shows of a run."""

    forecast: Forecast
    curves: dict[str, str]
    """Image and text losses as SVG."""
    grids: dict[int, Path]
    """Grids of samples by their steps, in order."""
    captions: list[str]
    """Of the samples."""


def is_watchable(run_dir: Path | None) -> TypeGuard[Path]:
    """Tell whether a CKPT lies in a run that has recorded a step."""
    return run_dir is not None and has_step(run_dir)


def watch(run_dir: Path, *, price: float = 0.0) -> Watched:
    """Read a run's files as they are now.

    Args:
        price: US dollars per GPU-hour.
    """
    run = read_run(run_dir, seed=0)
    baselines = image_baselines([run])
    return Watched(
        forecast=_forecast(run_dir, run.rows, price=price),
        curves={
            kind: loss_curves(run.rows, kind=kind, baselines=baselines if kind == "image" else {})
            for kind in ("image", "text")
            if any(f"{kind}_loss" in row.values for row in run.rows)
        },
        grids=grids_of(run_dir),
        captions=read_sample_captions(run_dir),
    )


def grids_of(run_dir: Path) -> dict[int, Path]:
    """List the grids of samples by their steps, in order."""
    return steps_of((run_dir / SAMPLES).glob("step_*.png"))


def version_of(run_dir: Path) -> tuple[int, int]:
    """Return what changes whenever a run has recorded or drawn something more, or has ended: bytes, and grids."""
    files = [run_dir / METRICS, run_dir / STATUS]
    return sum(file.stat().st_size for file in files if file.is_file()), len(grids_of(run_dir))


def _forecast(run_dir: Path, rows: list[Row], *, price: float) -> Forecast:
    train = [row for row in rows if row.split == TRAIN_ROWS]
    recent = [row.values["step_seconds"] for row in train[-RECENT_STEPS:] if "step_seconds" in row.values]
    last = train[-1] if train else Row(0, TRAIN_ROWS, values={})
    settings = read_settings(run_dir)
    check_keys(settings, {"train": {"max_steps": int}}, where=run_dir / RESOLVED)
    max_steps = settings["train"]["max_steps"]
    status = read_status(run_dir)
    left = sum(recent) / len(recent) * max(0, max_steps - last.step) if recent else None
    return Forecast(
        state=status.state if status else "not begun",
        step=last.step,
        max_steps=max_steps,
        seconds=last.values.get("seconds", 0.0),
        seconds_left=left if status and status.state == "running" else None,
        num_ranks=_num_ranks(run_dir),
        price=price,
    )


def _num_ranks(run_dir: Path) -> int:
    """Read how many processes made the newest checkpoint."""
    found = [folder for folder in committed(run_dir).values() if has_manifest(folder)]
    return read_checkpoint_manifest(found[-1]).facts.world_size if found else 1


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
