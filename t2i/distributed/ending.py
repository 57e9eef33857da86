"""Who says an error: however many ranks meet it, the job says it once, and each rank ends with its exit status."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch.distributed as dist

from t2i.distributed.health import Peers
from t2i.errors import EXPECTED, LostRankError, NumericalError, Stopped, exit_code

SHARED = (NumericalError, Stopped, KeyboardInterrupt)
"""What every rank raises alike: reduced over ranks before it is raised, or sent to all of them by the launcher."""

SAY_SECONDS = 30.0
"""Time that the first rank of a machine has to say an error before the other ranks end as well."""


@dataclass(frozen=True)
class Left:
    """What the other ranks left, as this one finds it when it meets an error."""

    lost: LostRankError | None = None
    """Another rank is the cause: it failed, hangs or is gone. None where this rank met an error without that."""
    speaks: bool = True
    """No lower rank still runs, and the first has not said why it ended."""


@dataclass(frozen=True)
class Ending:
    """What one process does with an error."""

    error: BaseException
    """The one to say: its own, or who is lost."""
    does: Literal["say", "say unless the first does", "go"]
    notes: bool
    """Leaves its traceback in the run folder, where other ranks look for who failed."""
    reports: bool
    """Writes status.json."""


@contextmanager
def said_once_per_machine() -> Iterator[None]:
    """Let an error that all ranks of a machine meet before they know each other be said by the first of them.

    Raises:
        SystemExit: this is another rank; its launcher has ended it, or the first rank is silent for too long.
    """
    try:
        yield
    except EXPECTED as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        # Were this rank the first to end, its launcher would end the one that is about to say why.
        if not isinstance(error, Stopped):
            with suppress(Stopped):
                time.sleep(SAY_SECONDS)
        sys.exit(exit_code(error))


def is_lost_connection(error: BaseException) -> bool:
    """Tell an error of a collective, whose cause is another rank, from one of this rank's own."""
    # NCCL's have a type; gloo raises RuntimeError and names itself in the text.
    is_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    return isinstance(error, RuntimeError) and is_collective


def ending(error: BaseException, *, rank: int, left: Left) -> Ending:
    """Decide what this process does with an error; pure, so that a table can test it.

    Where a rank is lost, the lowest that lives says who. What all ranks raise is the first rank's to say. Any other
    error is its own rank's, but users' errors, such as a wrong setting, often come to all ranks without a reduction.
    """
    if left.lost is not None:
        return Ending(left.lost, does="say" if left.speaks else "go", notes=left.speaks, reports=left.speaks)
    if rank == 0:
        return Ending(error, does="say", notes=True, reports=True)
    if isinstance(error, SHARED):
        return Ending(error, does="go", notes=False, reports=False)
    # Not reported: the first rank is about to lose this one, and will name it in status.json.
    is_expected = isinstance(error, EXPECTED)
    return Ending(
        error, does="say unless the first does" if is_expected else "say", notes=True, reports=False
    )


def look_around(peers: Peers, error: BaseException) -> Left:
    """Look what the other ranks left, for as long as the error is worth it."""
    if is_lost_connection(error):
        lost: LostRankError | None = peers.lost()
    else:
        # A launcher asks all ranks to end when one has failed, so a stop may be no wish of the user's.
        lost = peers.failed() if isinstance(error, Stopped) else None
    return Left(lost, speaks=lost is None or peers.speaks())


def leave(peers: Peers, error: BaseException, *, report: Callable[[BaseException], None]) -> NoReturn:
    """End this rank after an error, from within its `except`: raise what it has to say, or go without a word.

    Args:
        report: writes status.json.

    Raises:
        LostRankError: in place of an error whose cause is another rank.
        SystemExit: another rank says it.
    """
    found = ending(error, rank=peers.rank, left=look_around(peers, error))
    if found.notes:
        peers.note_failure(found.error)  # before any wait: others look for it meanwhile
    if found.reports:
        report(found.error)
        if not isinstance(found.error, (*EXPECTED, KeyboardInterrupt)):
            print(f"The traceback is also in {peers.run_dir / 'error.txt'}.", file=sys.stderr)
    is_said = found.does == "say unless the first does" and peers.first_says_it_too(error)
    if found.does == "go" or is_said:
        sys.exit(exit_code(found.error))
    if found.error is error:
        raise error
    raise found.error from error
