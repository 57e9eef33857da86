"""Other trackers beside TensorBoard: each follows metrics.jsonl in a process of its own.

A tracker may hang, fail, or wait for a network. In a process of its own it takes no second of the run, which waits for
it at its end alone, and not for long.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from t2i.env import outside_job, with_own_code
from t2i.errors import UserError
from t2i.files import lines_of

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
TRACKERS = "trackers"
"""Folder of a run with what its trackers keep and say."""
LAST_SECONDS = 5.0
"""How long a run waits at its end for its trackers."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are installed, before anything expensive.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"train.report_to names {name}, which is not installed; `pip install {name}` installs it."
            )


class Trackers:
    """The processes of a run's trackers."""

    def __init__(self, names: Sequence[str], *, run_dir: Path) -> None:
        """Start a process for each tracker; TensorBoard's events are written by the run itself."""
        self.run_dir = run_dir
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in names:
            if name != TENSORBOARD:
                try:
                    self.processes[name] = self._started(name)
                except OSError as error:
                    logger.warning("%s cannot be started (%s); metrics.jsonl is the record", name, error)

    def _started(self, name: str) -> "subprocess.Popen[bytes]":
        folder = self.run_dir / TRACKERS
        folder.mkdir(exist_ok=True)
        with (folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "t2i.train.following", str(self.run_dir.resolve()), name],
                env=with_own_code(outside_job(os.environ)) | {"CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.PIPE,  # its end tells that the run has ended, however it ended
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run
            )

    def close(self) -> None:
        """Tell the trackers that the run has ended, wait a moment, and say which have failed or are not done."""
        for process in self.processes.values():
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        end = time.monotonic() + LAST_SECONDS
        for name, process in self.processes.items():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            log = self.run_dir / TRACKERS / f"{name}.log"
            if process.returncode is None:
                logger.warning("%s is not done yet; it may take a minute more by itself, see %s", name, log)
            elif process.returncode:
                last = (lines_of(log.read_text(errors="replace").strip()) or [""])[-1]
                logger.warning("%s failed (%.200s), see %s; metrics.jsonl is the record", name, last, log)
        self.processes = {}
