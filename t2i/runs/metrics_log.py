"""metrics.jsonl: the metrics of a run, one row per recorded step, each appended whole or not at all."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

from t2i.files import write_whole

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
    """Read metrics.jsonl, without a last line that was cut off."""
    path = run_dir / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            # Only the last line can be cut off, by a machine that lost power.
            if number != len(lines) - 1:
                raise
    return rows


def rewind_metrics(run_dir: Path, *, step: int) -> None:
    """Move the rows after `step` to metrics.jsonl.rewound."""
    rows = read_metrics(run_dir)
    # The steps after it are done again, and no figure may show a step twice. Nothing is thrown away.
    later = [row for row in rows if step_of(row) > step]
    if not (run_dir / METRICS).exists():
        return
    with (run_dir / f"{METRICS}.rewound").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in later)
    write_whole(run_dir / METRICS, "".join(json.dumps(row) + "\n" for row in rows if step_of(row) <= step))
