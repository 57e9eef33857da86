"""Ranks that share only a folder: this process's rank, heartbeats, and waiting for the work of other ranks."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from t2i.errors import LostRankError, UserError

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 300.0
"""Time without a heartbeat after which a rank that others wait for counts as lost."""
LEAST_PAUSE_SECONDS, MOST_PAUSE_SECONDS, PAUSE_SHARE = 0.02, 1.0, 0.05
"""Pause between two looks: a share of the time waited so far, within bounds, to spare a shared disk."""


def place_in_job() -> tuple[int, int]:
    """Read this process's rank and the number of ranks, as set by torchrun, accelerate and deepspeed.

    Raises:
        UserError: they contradict each other.
    """
    rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
    )
    if not 0 <= rank < world_size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world_size}; expected 0 <= RANK < WORLD_SIZE.")
    return rank, world_size


@contextmanager
def signs_of_life(folder: Path, *, rank: int) -> Iterator[None]:
    """Send heartbeats: touch folder/RANK every few seconds, while the folder exists."""
    folder.mkdir(exist_ok=True)
    stop = threading.Event()

    def beat() -> None:
        while not stop.is_set():
            # The first rank removes the folder when all work is done. Any other error may be of a moment.
            with suppress(OSError):
                (folder / str(rank)).touch()
            stop.wait(BEAT_SECONDS)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass
class Watch:
    """When each rank's heartbeat last changed, by this machine's clock."""

    folder: Path
    seen: dict[int, tuple[int, float]] = field(default_factory=dict)

    def silence_seconds(self, rank: int) -> float:
        """Return the seconds since a rank's heartbeat last changed."""
        try:
            stamp = (self.folder / str(rank)).stat().st_mtime_ns
        except FileNotFoundError:
            stamp = 0
        except OSError:  # a shared disk that does not answer: nothing has changed, as far as is known
            stamp = self.seen.get(rank, (0, 0.0))[0]
        # A change of the file's time is what counts, not the time itself: clocks of machines differ.
        if rank not in self.seen or self.seen[rank][0] != stamp:
            self.seen[rank] = (stamp, time.monotonic())
        return time.monotonic() - self.seen[rank][1]


def wait_for(pending: Callable[[], Iterable[int]], *, folder: Path) -> None:
    """Wait until no rank has pending work.

    Args:
        pending: returns the ranks with pending work.

    Raises:
        LostRankError: one of them has no heartbeat any more.
    """
    watch, began = Watch(folder), time.monotonic()
    while ranks := sorted(set(pending())):
        lost = [rank for rank in ranks if watch.silence_seconds(rank) > PATIENCE_SECONDS]
        if lost:
            raise LostRankError(
                f"rank {', '.join(map(str, lost))} has pending work and sent no heartbeat for {PATIENCE_SECONDS:.0f} s."
                " Finished work is kept; run the same command on every rank to resume."
            )
        pause = PAUSE_SHARE * (time.monotonic() - began)
        time.sleep(min(max(pause, LEAST_PAUSE_SECONDS), MOST_PAUSE_SECONDS))
