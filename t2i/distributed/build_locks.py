"""Locks that killed builds of DeepSpeed's C++ operators leave, for which every later run would wait forever.

Torch before 2.14 takes a file's mere existence for a lock. Later releases let the kernel hold it, which ends with its
process, so there is nothing to do.
"""

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

from t2i.env import extensions_folder

logger = logging.getLogger(__name__)

BUILD_LOCK = "lock"
"""Torch's name of the file, beside what it builds."""
STALE_SECONDS = 900
"""Age of the newest file of a build after which it counts as dead: one whole build takes eight minutes at most."""


def remove_stale(operators: Iterable[str]) -> None:
    """Remove the locks that killed builds of these operators left; warn of those that may be of another machine."""
    if not _existence_is_the_lock():
        return
    for operator in operators:
        for lock in extensions_folder().rglob(f"{operator}/{BUILD_LOCK}"):
            if is_open_here(lock):
                continue  # a build that is running: torch waits for it
            # The folder may be shared between machines, whose processes cannot be seen from here.
            if _seconds_since_last_write(lock.parent) > STALE_SECONDS:
                lock.unlink(missing_ok=True)
                logger.warning("removed %s, which a killed build of DeepSpeed's operators had left", lock)
            else:
                logger.warning(
                    "waiting for %s, which no process of this machine holds; remove it if nobody else builds there",
                    lock,
                )


def is_open_here(path: Path) -> bool:
    """Tell whether a process of this machine may have the file open, as a builder has its lock."""
    wanted = path.stat()
    if wanted.st_uid != os.geteuid() or not Path("/proc/self/fd").is_dir():
        return True  # files of other users' processes cannot be seen
    return any(_has_open(process, wanted) for process in Path("/proc").iterdir() if process.name.isdigit())


def _has_open(process: Path, wanted: os.stat_result) -> bool:
    # Processes and their files come and go during the search.
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            if os.path.samestat(descriptor.stat(), wanted):
                return True
        except OSError:
            continue
    return False


def _seconds_since_last_write(folder: Path) -> float:
    return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _existence_is_the_lock() -> bool:
    from torch.utils import cpp_extension  # here: it looks for compilers, which only a run that builds needs

    return hasattr(cpp_extension, "FileBaton")
