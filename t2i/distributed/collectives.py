"""Collective operations: what ranks decide or find out together."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from t2i.errors import EXPECTED, CheckpointError, disk_reason

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) outside a job."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first_on_node() -> bool:
    """Tell whether this process does what is needed once per machine."""
    return os.environ["LOCAL_RANK"] == "0"


def on_first_rank(work: Callable[[], T]) -> T:
    """Do work on the first rank only, and return its result on every rank.

    Raises:
        UserError, CheckpointError, ...: what the work raised, on the first rank; the other ranks exit silently.
    """
    # The error is broadcast as an exit status, so that a job ends with one sentence and no rank waits for ever in
    # its next collective.
    outcome: list[Any] = [None, 0]
    error: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except EXPECTED as expected:
            error, outcome[1] = expected, expected.exit_code
        except OSError as failed:
            error = CheckpointError(disk_reason(failed))
            outcome[1] = CheckpointError.exit_code
    # With its error: a check that fails on one rank alone would leave the others in a collective that never ends.
    dist.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1]:
        sys.exit(outcome[1])
    return outcome[0]  # type: ignore[no-any-return]


def any_rank(claim: bool) -> bool:
    """Tell whether a claim is true on any rank; every rank must call this."""
    return any(of_all_ranks([claim]))


def of_all_ranks(values: list[T]) -> list[T]:
    """Join the lists of all ranks, in order of rank; every rank must call this."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]
