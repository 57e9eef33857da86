"""Requests to stop or to save: signals, a launcher that is gone, files in the run folder. Handlers only set a flag."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from t2i.errors import Stopped

STOP, SAVE = "STOP", "SAVE"
"""Files of the run folder: `touch RUN/STOP` ends a run after its step, saved; `touch RUN/SAVE` makes a checkpoint."""

PARENT_SECONDS = 0.5
"""Between looks at whether the launcher still lives."""

BEFORE_A_STEP = "Stopped before the first step of this start; the same command goes on."

DEEPSPEED, TORCHRUN = b"deepspeed.launcher.launch", b"torchrun"
"""Words in the command lines of launchers that start ranks on a machine."""


@dataclass
class StopFlag:
    """Set by a signal, read once a step. A second Ctrl-C ends at once."""

    is_noted: bool = False
    num_interrupts: int = 0
    raises: bool = True
    """Before the first step nothing is to be saved, so a request ends the process where it is."""
    is_leaving: bool = False
    """The process is ending already and writes down why, which no further signal cuts short."""

    def note(self, number: int, frame: object = None) -> None:
        """Take a signal."""
        # Handlers only note: a collective that one rank leaves by an exception would hold all others.
        self.is_noted = True
        self.num_interrupts += number == signal.SIGINT
        if self.is_leaving:
            return
        if self.num_interrupts > 1:
            raise KeyboardInterrupt
        # Nothing is to be saved yet, and compilers, which may run for minutes, poll no flag.
        if self.raises:
            raise Stopped(BEFORE_A_STEP)

    def is_set(self) -> bool:
        """Tell whether a request has come."""
        return self.is_noted


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Turn SIGTERM, Ctrl-C and the loss of the launcher into a flag."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag.note) for number in (signal.SIGTERM, signal.SIGINT)}
    ended = threading.Event()
    # It sends SIGTERM, as a user would, so that there is one way to stop in every phase.
    watch = threading.Thread(target=_watch_parents, args=(ended,), daemon=True)
    watch.start()
    try:
        yield flag
        if flag.is_noted and flag.raises:  # some library caught what the signal raised, as imports do
            raise Stopped(BEFORE_A_STEP)
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Requests:
    """What is asked of a run while it trains: by signals to this rank, by files in its folder, or in advance."""

    flag: StopFlag
    run_dir: Path
    reads_files: bool
    """One rank looks for them and tells the others: on a shared disk each would see them at another time."""
    stop_at: int | None = None
    """Stop after this step; None for the run's last."""

    def begin(self) -> None:
        """From now on a request waits for the end of its step."""
        self.flag.raises = False

    def is_signalled(self) -> bool:
        """Tell whether a signal asked this rank to stop, which breaks off a measure too."""
        return self.flag.is_set()

    def should_stop(self) -> bool:
        """Tell whether this rank was asked to stop after its step."""
        return self.is_signalled() or self._has(STOP)

    def should_save(self) -> bool:
        """Tell whether this rank was asked to save."""
        return self._has(SAVE)

    def grant(self, name: str) -> None:
        """Remove the file STOP or SAVE, whose wish is done."""
        if self.reads_files:
            (self.run_dir / name).unlink(missing_ok=True)

    def _has(self, name: str) -> bool:
        return self.reads_files and (self.run_dir / name).exists()


def launchers() -> dict[int, int]:
    """Name the processes whose loss means stop, each with its parent: who launched this rank, and `deepspeed` itself.

    The `deepspeed` command forwards no signal: killed, it leaves its launcher and the ranks behind. A process without
    a launcher has none, so that a shell may be closed over it.
    """
    parent = os.getppid()
    command = _command(parent)
    if DEEPSPEED in command:
        return {os.getpid(): parent, parent: parent_of(parent)}
    return {os.getpid(): parent} if TORCHRUN in command else {}


def parent_of(pid: int) -> int:
    """Read a process's parent; 0 if the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[1])


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _watch_parents(ended: threading.Event) -> None:
    """Send this process SIGTERM once its launcher, or the launcher's own, is gone."""
    parents = launchers()
    while parents and not ended.wait(PARENT_SECONDS):
        if any(parent_of(pid) != parent for pid, parent in parents.items()):
            os.kill(os.getpid(), signal.SIGTERM)
            return
