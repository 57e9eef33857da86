"""The process of one tracker: `python -m t2i.train.following RUN NAME` reports the rows of metrics.jsonl as they come.

It ends when its standard input does, which the run holds open.
"""

import itertools
import json
import os
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from t2i.distributed.run_id import read_run_id
from t2i.files import is_readable, read_optional_json, read_yaml, write_json
from t2i.runs.checkpoint_manifest import steps_of
from t2i.runs.metrics_log import METRICS, MetricsRow, parse_row, step_of
from t2i.runs.run_folder import RESOLVED, SAMPLES
from t2i.train.trackers import TRACKERS

PROJECT = "t2i"
LOOK_SECONDS = 1.0
LAST_SECONDS = 60.0
"""How long a tracker may take to finish after the run has ended; then its process ends in any case."""


def follow(run_dir: Path, name: str) -> None:
    """Report a run to a tracker until standard input ends."""
    PartialState(cpu=True)  # accelerate's trackers log by it
    state = run_dir / TRACKERS / f"{name}.json"
    # Of a resumed run, an earlier process has reported the first rows.
    known: dict[str, Any] = {"step": -1, "sample": -1, "run": None}
    known |= read_optional_json(state)
    # By split: a run that was stopped while it measured measures that step again, whose own row was reported.
    marks = known.setdefault("splits", {})
    before, otherwise = dict(marks), -1 if marks else known["step"]
    tracker = _opened(name, run_dir=run_dir, run=known["run"])
    tracker.start()
    tracker.store_init_configuration(dict(flat(read_yaml(run_dir / RESOLVED, name=RESOLVED))))
    # MLflow names its runs itself.
    known["run"] = getattr(getattr(tracker.tracker, "info", None), "run_id", None)
    look, is_over = Look(run_dir / METRICS), False
    end = threading.Timer(LAST_SECONDS, os._exit, [1])
    end.daemon = True
    while True:
        rows = look.new_rows()
        for row in rows:
            split = str(row.get("split", ""))
            # Not the steps of this process: held-out rows come some seconds after their step's own.
            if step_of(row) > before.get(split, otherwise):
                tracker.log(numbers(row), step=step_of(row))
                marks[split] = max(marks.get(split, -1), step_of(row))
        known["step"] = max([known["step"], *map(step_of, rows)])
        known["sample"] = _show_samples(tracker, run_dir, after=known["sample"], now=known["step"])
        write_json(state, known)
        if is_over:
            tracker.finish()
            end.cancel()
            return
        is_over = is_readable(sys.stdin, seconds=LOOK_SECONDS)
        if is_over:
            end.start()


def _opened(name: str, *, run_dir: Path, run: str | None) -> GeneralTracker:
    kind, folder, run_id = LOGGER_TYPE_TO_CLASS[name], run_dir / TRACKERS, read_run_id(run_dir)
    own: dict[str, dict[str, object]] = {
        "wandb": {
            "name": run_dir.name,
            "id": run_id or None,
            "resume": "allow",
            "dir": str(folder),
        },
        "mlflow": {"run_name": run_dir.name, "run_id": run},
        # Its runs have no id beside the name, and another run's folder may have the same name.
        "trackio": {"name": " ".join([run_dir.name, run_id[:8]]).strip(), "resume": "allow"},
    }
    if name == "mlflow":
        # A database: MLflow 3 refuses a folder of files.
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    return kind(PROJECT, **own[name])


class Look:
    """Reads metrics.jsonl as it grows, also where a run went back to a checkpoint and writes on from there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums: list[int] = []
        """A checksum of each line that was read."""
        self.position = 0
        self.last = b""
        """The last line that was read."""

    def new_rows(self) -> list[MetricsRow]:
        """Read the whole lines that came since the last look, and return their rows."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position - len(self.last))
            # Another line in its place: the file was cut meanwhile, and may even be longer again.
            was_cut = file.read(len(self.last)) != self.last
            if was_cut:
                file.seek(0)
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        sums, before = [zlib.crc32(line) for line in lines], self.sums
        if was_cut:
            self.position, self.last, self.sums = 0, b"", []
        self.position += sum(map(len, lines))
        self.last = lines[-1] if lines else self.last
        self.sums += sums
        kept = zip(sums, before, strict=False) if was_cut else ()
        num_known = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], kept))
        return [row for line in lines[num_known:] if (row := parse_row(line)) is not None]


def numbers(row: MetricsRow) -> dict[str, float]:
    """Return the numbers of a row, by the names that TensorBoard shows them under."""
    group = row.get("split", "train")
    return {
        f"{group}/{key}": value
        for key, value in row.items()
        if isinstance(value, int | float) and key != "step"
    }


def flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as group.key and value; what is no number or text, as text."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                value if isinstance(value, bool | int | float | str) else json.dumps(value),
            )


def _show_samples(tracker: GeneralTracker, run_dir: Path, *, after: int, now: int) -> int:
    """Show grids of sampled images, where accelerate's tracker takes images; return the last one's step."""
    for step, path in steps_of((run_dir / SAMPLES).glob("step_*.png")).items():
        if hasattr(tracker, "log_images") and after < step <= now:
            with Image.open(path, formats=("PNG",)) as sheet:
                # At the step reported last: W&B drops what comes for an earlier one.
                tracker.log_images({"samples": [sheet.copy()]}, step=now)
            after = step
    return after


if __name__ == "__main__":
    follow(Path(sys.argv[1]), sys.argv[2])
