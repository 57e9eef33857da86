"""Remove shared memory that killed runs of t2i left behind, if no process uses it.

Streaming keeps /dev/shm/NUMBER_* and lock files NUMBER_*_filelock among the temporary files, DeepSpeed's CPU reduction
deepspeed_allreduce_buffer_* of 69 MB per rank. A clean exit leaves some of them too. A full /dev/shm kills processes
with SIGBUS.

Other programs use both libraries, and people name files as they like. So t2i chooses what its files are called: numbers
that begin with MARK, and an address of the loopback network that is its own. Nothing else is touched.
"""

import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from t2i.distributed.rendezvous import LOOPBACK
from t2i.env import SHARED_MEMORY

logger = logging.getLogger(__name__)

PROCESSES = Path("/proc")
MARK, MORE_DIGITS = "845073", 12
"""How t2i's numbers of Streaming's files begin (T2I in ASCII), and how many digits of chance follow."""
STREAMING = re.compile(rf"({MARK}\d{{{MORE_DIGITS}}})_\w+")
LOCK = re.compile(rf"({MARK}\d{{{MORE_DIGITS}}})_\w+_filelock")
DEEPSPEED = re.compile(rf"(deepspeed_allreduce_buffer_\d+_{re.escape(LOOPBACK)}_\d+)_\d+")
MIN_AGE_SECONDS = 60.0
"""Younger files may belong to a run that is just starting."""
INITIAL_PIDS, INITIAL_IPC = "pid:[4026531836]", "ipc:[4026531839]"
"""Linux's names of the host's own namespaces."""


def new_number() -> int:
    """Draw the number of a data set's files: no other has it, and `sweep` knows it for t2i's."""
    return int(f"{MARK}{secrets.randbelow(10**MORE_DIGITS):0{MORE_DIGITS}d}")


def sweep() -> list[Path]:
    """Remove the shared memory and lock files that dead runs of this user left, and return the removed files."""
    if not PROCESSES.is_dir() or _shares_memory_with_unseen():
        return []
    # A run's files are removed together or not at all: the lock files of a live run are open only now and then.
    in_use = _files_in_use()
    removed = [
        path
        for paths in _runs().values()
        if all(_is_mine_and_old(path) for path in paths) and in_use.isdisjoint(map(str, paths))
        for path in paths
        if _remove(path)
    ]
    if removed:
        logger.info("removed %d files of shared memory and locks left by dead runs", len(removed))
    return removed


def _runs() -> dict[str, list[Path]]:
    """Group files by the run that made them."""
    runs: dict[str, list[Path]] = {}
    places = ((SHARED_MEMORY, (STREAMING, DEEPSPEED)), (Path(tempfile.gettempdir()), (LOCK,)))
    for folder, patterns in places:
        for path in folder.iterdir() if folder.is_dir() else ():
            found = next(filter(None, (pattern.fullmatch(path.name) for pattern in patterns)), None)
            if found:
                runs.setdefault(found[1], []).append(path)
    return runs


def _files_in_use() -> set[str]:
    """List the files that this user's processes have mapped or open."""
    return {name for process in PROCESSES.glob("[0-9]*") for name in _files_of(process)}


def _files_of(process: Path) -> Iterator[str]:
    # Both, because a mapped file need not be open, and an open one need not be mapped.
    with suppress(OSError):  # the process has ended, or belongs to another user
        for line in (process / "maps").read_text(errors="replace").splitlines():
            yield "/" + line.partition(" /")[2]
    with suppress(OSError):
        for link in (process / "fd").iterdir():
            with suppress(OSError):
                yield str(link.readlink())


def _is_mine_and_old(path: Path) -> bool:
    with suppress(FileNotFoundError):
        found = path.stat()
        return found.st_uid == os.getuid() and time.time() - found.st_mtime > MIN_AGE_SECONDS
    return False


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # another run removed it at the same time
        return False
    return True


def _shares_memory_with_unseen() -> bool:
    """Tell whether this is a container that shares the host's memory but cannot see its processes."""
    # There a file may be in use by a process that /proc does not show, so nothing may be removed.
    own = PROCESSES / "self" / "ns"
    pids, ipc = (str((own / name).readlink()) for name in ("pid", "ipc"))
    return ipc == INITIAL_IPC and pids != INITIAL_PIDS
