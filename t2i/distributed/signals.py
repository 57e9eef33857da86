"""Requests to stop or save: signals, the loss of the launcher, files in the run folder. Handlers only set a flag."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from t2i.distributed.run_id import OwnFolder
from t2i.errors import Stopped

STOP, SAVE = "STOP", "SAVE"
"""Files in the run folder: `touch RUN/STOP` saves and ends the run after its step; `touch RUN/SAVE` saves."""

PARENT_SECONDS = 0.5
"""Interval of checks that the launcher is alive."""

BEFORE_A_STEP = "Stopped before the first step of this start. Run the same command to resume."

PR_SET_PDEATHSIG = 1
"""An option of Linux's prctl: the signal that a process gets when its parent dies."""

DEEPSPEED, TORCHRUN = b"deepspeed.launcher.launch", b"torchrun"
"""Words in the command lines of launchers, by which they are recognised."""


@dataclass
class StopFlag:
    """Set by a signal and read once per step. A second Ctrl-C ends the process at once."""

    is_noted: bool = False
    num_interrupts: int = 0
    raises: bool = True
    """Raise at once, which is right before the first step, when there is nothing to save."""
    is_leaving: bool = False
    """The process is ending and writes down why, which no further signal may interrupt."""

    def note(self, number: int, frame: object = None) -> None:
        """Handle a signal.

        Raises:
            Stopped: no step has begun.
            KeyboardInterrupt: it is the second Ctrl-C.
        """
        # Between, it only notes: a collective that one rank leaves by an exception would hold all others.
        self.is_noted = True
        self.num_interrupts += number == signal.SIGINT
        if self.is_leaving:
            return
        if self.num_interrupts > 1:
            raise KeyboardInterrupt
        # Nothing is to be saved yet, and compilers, which may run for minutes, poll no flag.
        if self.raises:
            raise Stopped(BEFORE_A_STEP)
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            # Not by print or logging, which this signal may have interrupted.
            os.write(2, f"\n{_interrupted()}\n".encode())

    def begin(self) -> None:
        """Only note signals from now on: there is something to save."""
        self.raises = False

    def is_set(self) -> bool:
        """Tell whether a signal has arrived."""
        return self.is_noted


def _interrupted() -> str:
    """Say what Ctrl-C does; where the `deepspeed` command met it too, that its traceback is none of the run's."""
    said = "Ctrl-C: the run ends after this step, and saves. Ctrl-C again ends it at once."
    if DEEPSPEED not in command_of(os.getppid()):
        return said
    return f"{said} A KeyboardInterrupt here is the `deepspeed` command's own; the ranks still save."


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Turn SIGTERM, Ctrl-C and the loss of the launcher into a flag.

    Raises:
        Stopped: a signal arrived before the first step.
    """
    flag = StopFlag()
    before = {number: signal.signal(number, flag.note) for number in (signal.SIGTERM, signal.SIGINT)}
    ended = threading.Event()
    # It sends SIGTERM, as a user would, so that there is one way to stop in every phase.
    watch = threading.Thread(target=_watch_parents, args=(ended,), daemon=True)
    watch.start()
    try:
        yield flag
        # Some library caught what the signal raised, as optional imports do.
        if flag.is_noted and flag.raises:
            raise Stopped(BEFORE_A_STEP)
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Requests:
    """Requests to a run while it trains: signals to this rank, files in its folder, and a step to stop at."""

    flag: StopFlag
    folder: OwnFolder
    reads_files: bool
    """Whether this rank looks for the files; one does, because on a shared disk ranks see them at different times."""
    stop_at: int | None = None
    """Stop after this step; None for the run's last step."""

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.folder.path

    def begin(self) -> None:
        """Have requests wait for the end of the current step from now on."""
        self.flag.begin()

    def is_signalled(self) -> bool:
        """Tell whether a signal asked this rank to stop, which also interrupts a measure."""
        return self.flag.is_set()

    def should_stop(self) -> bool:
        """Tell whether this rank was asked to stop after the current step, or has lost the run's folder."""
        # The last save then refuses on all ranks together: only the first one looks at the folder.
        return self.is_signalled() or self._has(STOP) or (self.reads_files and not self.folder.is_own())

    def should_save(self) -> bool:
        """Tell whether this rank was asked to save."""
        return self._has(SAVE)

    def grant(self, name: str) -> None:
        """Remove the file STOP or SAVE once its request is fulfilled."""
        if self.reads_files:
            (self.run_dir / name).unlink(missing_ok=True)

    def _has(self, name: str) -> bool:
        # Not Path.exists, which raises where a shared disk does not answer: no file is seen then, until the next step.
        return self.reads_files and os.path.exists(self.run_dir / name)  # noqa: PTH110


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, which may have happened already."""
    # A process that is killed cannot end its children, and an orphan would hold memory and shared memory.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def launchers() -> dict[int, int]:
    """List the processes whose parent's loss means stop, with these parents: this rank and `deepspeed`'s launcher."""
    # The `deepspeed` command forwards no signal: killed, it leaves its launcher and the ranks behind. A process
    # without a launcher watches nothing, so that the shell that started it may be closed.
    parent = os.getppid()
    command = command_of(parent)
    if DEEPSPEED in command:
        return {os.getpid(): parent, parent: parent_of(parent)}
    return {os.getpid(): parent} if TORCHRUN in command else {}


def parent_of(pid: int) -> int:
    """Read a process's parent; 0 if the process is gone."""
    try:
        # After the last bracket, because the command's name before it may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[1])


def command_of(pid: int) -> bytes:
    """Read a process's command line; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _watch_parents(ended: threading.Event) -> None:
    """Send this process SIGTERM once its launcher, or the launcher's launcher, is gone."""
    # As a signal, so that there is one way to stop, in every phase of a run.
    parents = launchers()
    while parents and not ended.wait(PARENT_SECONDS):
        if any(parent_of(pid) != parent for pid, parent in parents.items()):
            os.kill(os.getpid(), signal.SIGTERM)
            return
