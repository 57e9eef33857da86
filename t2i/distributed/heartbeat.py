"""Ranks that share nothing but a folder: where this process stands, signs of life, waiting for another's work."""

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
"""A rank that others wait for and that shows no life for so long is given up."""
LEAST_PAUSE_SECONDS, MOST_PAUSE_SECONDS, PAUSE_SHARE = 0.02, 1.0, 0.05
"""Between two looks, which a shared disk answers: a share of what was waited for already, within bounds."""


def place_in_job() -> tuple[int, int]:
    """Read this process's rank and the number of ranks, as torchrun, accelerate and deepspeed set them.

    Raises:
        UserError: they contradict.
    """
    rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
    )
    if not 0 <= rank < world_size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world_size}; a rank is below the number of ranks.")
    return rank, world_size


@contextmanager
def signs_of_life(folder: Path, *, rank: int) -> Iterator[None]:
    """Touch folder/RANK every few seconds, while the folder is there."""
    folder.mkdir(exist_ok=True)
    stop = threading.Event()

    def beat() -> None:
        while not stop.is_set():
            with suppress(FileNotFoundError):  # the work is done and its folder removed
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
    """When each rank was last seen, by this machine's clock: machines' clocks may differ."""

    folder: Path
    seen: dict[int, tuple[int, float]] = field(default_factory=dict)

    def silence_seconds(self, rank: int) -> float:
        """Tell for how long a rank has shown no life."""
        try:
            stamp = (self.folder / str(rank)).stat().st_mtime_ns
        except FileNotFoundError:
            stamp = 0
        # A changed stamp, seen by this clock: how old a stamp is depends on two machines' clocks and a disk's.
        if rank not in self.seen or self.seen[rank][0] != stamp:
            self.seen[rank] = (stamp, time.monotonic())
        return time.monotonic() - self.seen[rank][1]


def wait_for(owing: Callable[[], Iterable[int]], *, folder: Path) -> None:
    """Wait until no rank owes anything.

    Args:
        owing: names the ranks that still owe something.

    Raises:
        LostRankError: one of them shows no life any more.
    """
    watch, began = Watch(folder), time.monotonic()
    while ranks := sorted(set(owing())):
        lost = [rank for rank in ranks if watch.silence_seconds(rank) > PATIENCE_SECONDS]
        if lost:
            raise LostRankError(
                f"rank {', '.join(map(str, lost))} owes work and has shown no life for {PATIENCE_SECONDS:.0f} s."
                " What is whole is kept; start the same command again on every rank."
            )
        pause = PAUSE_SHARE * (time.monotonic() - began)
        time.sleep(min(max(pause, LEAST_PAUSE_SECONDS), MOST_PAUSE_SECONDS))
