"""metrics.jsonl: the metrics of a run, one row per recorded step, each appended whole or not at all."""

import errno
import json
import logging
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"

MetricValue = float | str | list[str] | None
MetricsRow = dict[str, MetricValue]
"""One row: `step`, perhaps `split`, and numbers by their names; None where nothing was counted or it is not finite."""


def step_of(row: Mapping[str, MetricValue]) -> int:
    """Return the step of a row."""
    step = row["step"]
    assert isinstance(step, int), f"step is {step!r}"
    return step


def append_metrics(run_dir: Path, *rows: MetricsRow) -> None:
    """Append rows to metrics.jsonl, whole or not at all.

    Raises:
        OSError: the disk refuses; the file is unchanged.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = run_dir / METRICS
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # One write: a kill comes before it or after it. A full disk may take a part of it, which is cut off again.
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, text) != len(text):
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_metrics(run_dir: Path) -> list[MetricsRow]:
    """Read metrics.jsonl, without a last line that was cut off; a warning counts other lines that are no rows."""
    path = run_dir / METRICS
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows = [parse_row(line) for line in lines]
    # Of the last line nothing is said: a machine lost power, or it is being written now.
    torn = [number for number, row in enumerate(rows[:-1], 1) if row is None]
    if torn:
        logger.warning(
            "%s: %d of %d lines are no rows and are left out; the first is line %d.",
            *(path, len(torn), len(lines) - 1, torn[0]),
        )
    return [row for row in rows if row is not None]


def rewind_metrics(run_dir: Path, *, step: int) -> None:
    """Move the rows after `step` to metrics.jsonl.rewound."""
    path = run_dir / METRICS
    if not path.exists():
        return
    # The steps after it are done again, and no figure may show a step twice. Nothing is thrown away.
    end = next((end for end, row in _rows_from_the_end(path) if row and step_of(row) <= step), 0)
    with path.open("r+b") as file:
        file.seek(end)
        later = file.read()
        if not later:
            return
        with (run_dir / f"{METRICS}.rewound").open("ab") as rewound:
            rewound.write(later[: later.rfind(b"\n") + 1])  # without a line that was cut off
        file.truncate(end)


def rows_of_step(run_dir: Path, step: int) -> Iterator[MetricsRow]:
    """Read the rows of a step that is among the last ones, from the end of metrics.jsonl, last row first."""
    for _, row in _rows_from_the_end(run_dir / METRICS):
        if row and step_of(row) < step:
            return
        if row and step_of(row) == step:
            yield row


def heldout_loss(rows: Iterable[MetricsRow]) -> float | None:
    """Return the loss that says whether a run overfits: of held-out images, or of text where there are none."""
    row = next((row for row in rows if row.get("split") == "heldout"), {})
    found = (row.get(key) for key in ("image_loss", "text_loss"))
    return next((value for value in found if isinstance(value, float)), None)


def has_step(run_dir: Path) -> bool:
    """Tell whether a training step was recorded; what is measured before the first one is of step 0."""
    return any(row and step_of(row) > 0 for _, row in _rows_from_the_end(run_dir / METRICS))


def _rows_from_the_end(path: Path) -> Iterator[tuple[int, MetricsRow | None]]:
    """Yield each line's end in the file and its row, the last line first; None for a line that is no row."""
    # Not read as a whole: a long run has millions of rows, and a resume needs the last few.
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = len(text)
        while end:
            start = text.rfind(b"\n", 0, end - 1) + 1
            line = text[start:end]
            yield end, parse_row(line) if line.endswith(b"\n") else None
            end = start


def parse_row(line: bytes) -> MetricsRow | None:
    """Parse one line of metrics.jsonl; None if it is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    # A bool is an int in Python, but true is no step.
    return row if type(step) is int and 0 <= step < 2**63 else None
