"""The health of a job: which rank is lost and why, and a watchdog for steps that never end."""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch.distributed as dist

from t2i.distributed.run_id import OwnFolder
from t2i.errors import LostRankError, Stopped, exit_code

ERROR, STEP = "error.txt", "step"
SEARCH_SECONDS = 3.0
"""How long a survivor looks for the lost rank: a dying process closes its connections before it is gone."""
BACKSTOP_SECONDS = 30.0
"""Delay after which faulthandler ends the process if the watchdog could not; it needs no interpreter."""
TICK_SECONDS = 1.0
SLOW_STEPS, REMEMBERED_STEPS = 20, 64
"""A step counts as hanging after SLOW_STEPS times the median of the last REMEMBERED_STEPS steps."""


def error_file(run_dir: Path, rank: int) -> Path:
    """Name the file of a rank's traceback; its first line has the exit status and the reason."""
    return run_dir / (ERROR if rank == 0 else f"error_rank{rank}.txt")


def hang_file(run_dir: Path, rank: int) -> Path:
    """Name the file of a rank's stacks at the time when it was found to hang."""
    return run_dir / f"hang_rank{rank}.txt"


@dataclass(frozen=True)
class Peers:
    """The processes of all ranks; made by all ranks together."""

    folder: OwnFolder
    rank: int
    places: list[tuple[str, int]]
    """Host name and process id of each rank."""

    @classmethod
    def meet(cls, folder: OwnFolder) -> "Peers":
        """Exchange hosts and process ids, and remove the error files of an earlier start of this run."""
        rank = dist.get_rank()
        for file in (error_file(folder.path, rank), hang_file(folder.path, rank)):
            file.unlink(missing_ok=True)
        places: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(places, (socket.gethostname(), os.getpid()))
        return cls(folder, rank, places)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.folder.path

    def note_failure(self, error: BaseException) -> None:
        """Write why this rank ends into the run folder, with its traceback unless it was asked to."""
        was_asked = isinstance(error, Stopped | KeyboardInterrupt)
        if was_asked and len(self.places) == 1:
            return  # no other rank looks for it, and the user knows
        with suppress(OSError):  # a full disk must not hide the error
            head = f"exit {exit_code(error)}: {' '.join(str(error).split()) or type(error).__name__}"
            if self.folder.is_own():
                trace = "" if was_asked else traceback.format_exc()
                error_file(self.run_dir, self.rank).write_text(f"{head}\n{trace}")

    def lost(self) -> LostRankError:
        """Find out which rank is lost; the error has that rank's exit status if it left one."""
        ended = time.monotonic() + SEARCH_SECONDS
        # In this order: a reason that a rank wrote says more than its absence.
        while time.monotonic() < ended:
            found = self.failed() or self._hung() or self._gone()
            if found is not None:
                return found
            time.sleep(0.1)
        return LostRankError(
            "The connection to another rank is lost. Run the same command to resume from the last save."
        )

    def speaks(self) -> bool:
        """Tell whether this rank reports for the job: the lowest one alive, unless the first has reported."""
        below = range(self.rank)
        return not (self.rank and self.failure(0)) and not any(self._runs(rank) for rank in below)

    def first_says_it_too(self, error: BaseException) -> bool:
        """Wait a moment for the first rank to fail with the same message as this one."""
        ended = time.monotonic() + SEARCH_SECONDS
        while time.monotonic() < ended:
            if self.failure(0) == (exit_code(error), " ".join(str(error).split())):
                return True
            time.sleep(0.1)
        return False

    def failure(self, rank: int) -> tuple[int, str] | None:
        """Read the exit status and reason that a rank left; None if it left none, or only lost another rank."""
        try:
            head = error_file(self.run_dir, rank).read_text(errors="replace").partition("\n")[0]
            code, _, reason = head.removeprefix("exit ").partition(": ")
            # A rank that lost a peer is no cause, or two survivors would blame each other.
            return None if int(code) == LostRankError.exit_code else (int(code), reason)
        except (OSError, ValueError):  # not there, or still being written
            return None

    def state(self, rank: int) -> str:
        """Return a rank's process state: empty if it is gone, `T` if it is stopped; `R` if on another machine."""
        host, pid = self.places[rank]
        if host != socket.gethostname():
            return "R"  # nothing can be seen of it
        try:
            return (
                Path(f"/proc/{pid}/stat")
                .read_text()
                .rpartition(")")[2]
                .split()[0]
                .replace("Z", "")
                .replace("X", "")
            )
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def _runs(self, rank: int) -> bool:
        return self.state(rank) not in ("", "T") and self.failure(rank) is None

    def _others(self) -> list[int]:
        return [rank for rank in range(len(self.places)) if rank != self.rank]

    def failed(self) -> LostRankError | None:
        """Find another rank that left a reason for its failure; the error has its exit status."""
        for rank in self._others():
            if found := self.failure(rank):
                code, reason = found
                file = error_file(self.run_dir, rank)
                error = LostRankError(f"Rank {rank} failed: {reason} Its traceback is in {file}.")
                error.exit_code = code if code != 1 else LostRankError.exit_code
                return error
        return None

    def _hung(self) -> LostRankError | None:
        files = [hang_file(self.run_dir, rank) for rank in self._others()]
        found = [file for file in files if file.exists() and file.stat().st_size]
        return LostRankError(f"A rank timed out; its stacks are in {found[0]}.") if found else None

    def _gone(self) -> LostRankError | None:
        gone = [rank for rank in self._others() if not self.state(rank)]
        if not gone:
            return None
        named = ", ".join(
            f"rank {rank} (process {self.places[rank][1]} on {self.places[rank][0]})" for rank in gone
        )
        return LostRankError(
            f"Lost {named}: it was killed, perhaps because its machine ran out of memory. Run the same command to"
            " resume from the last save."
        )


class Watchdog:
    """Ends this process when a step, a save or a measure takes far too long, with all threads' stacks in a file."""

    def __init__(self, peers: Peers, *, seconds: float, on_hang: Callable[[LostRankError], None]) -> None:
        """Start the watchdog.

        Args:
            seconds: the time that a step may take, if SLOW_STEPS times the median is not more; 0 for no watchdog.
            on_hang: called before the process ends, on the rank that reports for the job.
        """
        self.peers = peers
        self.seconds = seconds
        self.on_hang = on_hang
        self.what, self.allowed, self.waited = "", float("inf"), 0.0
        self.armed = time.monotonic()
        self.step_seconds: deque[float] = deque([0.0], maxlen=REMEMBERED_STEPS)
        self.ended = threading.Event()
        if seconds:
            self.file = hang_file(peers.run_dir, peers.rank).open("w")
            threading.Thread(target=self._watch, daemon=True).start()

    def arm(self, what: str, *, times: float = 1.0) -> None:
        """Start the clock for something, which may take `times` as long as a step."""
        now = time.monotonic()
        if self.what == STEP:
            self.step_seconds.append(now - self.armed)
        self.what, self.armed, self.waited = what, now, 0.0
        if self.seconds:
            self.allowed = times * max(self.seconds, SLOW_STEPS * median(self.step_seconds))
            # The thread ends the process with its own exit status. faulthandler comes later, because its
            # exit status is 1, but it works even if no Python code can run.
            faulthandler.dump_traceback_later(self.allowed + BACKSTOP_SECONDS, file=self.file, exit=True)

    def close(self) -> None:
        """Stop the watchdog."""
        self.ended.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()
            self.file.close()
            hang_file(self.peers.run_dir, self.peers.rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self.ended.wait(min(TICK_SECONDS, self.seconds / 4)):
            now = time.monotonic()
            # Counted in ticks: a process that was stopped and continued (Ctrl-Z, fg) was not waiting meanwhile.
            self.waited += min(now - last, 2 * TICK_SECONDS)
            last = now
            if self.waited > self.allowed:
                self._end()

    def _end(self) -> None:
        faulthandler.dump_traceback(file=self.file)
        self.file.flush()
        stopped = [rank for rank in range(len(self.peers.places)) if self.peers.state(rank) == "T"]
        who = f" Rank {', '.join(map(str, stopped))} is stopped (SIGSTOP)." if stopped else ""
        error = LostRankError(
            f"A {self.what} timed out after {self.waited:.0f} s.{who} All stacks are in {self.file.name}. Run the same"
            " command to resume from the last save."
        )
        if self.peers.speaks():
            self.on_hang(error)
        # On every rank that hangs, because it is not known which one is the cause.
        print(error, file=sys.stderr, flush=True)
        # Not sys.exit: the main thread is in a call that never returns.
        os._exit(LostRankError.exit_code)
