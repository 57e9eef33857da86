"""OUT.part/, where shards are made: who works in it, what is said of a full disk, and how it becomes OUT."""

import errno
import fcntl
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from t2i.data.shards.manifest import MANIFEST
from t2i.errors import CheckpointError, UserError
from t2i.files import read_json

logger = logging.getLogger(__name__)

ARGUMENTS = "arguments.json"
RANKS = "ranks"
"""Heartbeats and locks of the ranks."""
UNITS = "units"
"""What is known of each complete unit."""
WORKING = (UNITS, RANKS, "writing")
"""Folders of OUT.part that are removed before it becomes OUT."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def place_of(out: Path) -> Path:
    """Find where the shards come to lie: behind a link, on the disk that it leads to.

    Raises:
        UserError: something else is there.
    """
    out = out.resolve() if out.is_symlink() or out.name in ("", "..") else out
    if not out.exists() or (out / MANIFEST).is_file():
        return out
    if not out.is_dir() or any(out.iterdir()):
        raise UserError(f"--out {out} exists and is no shard folder; choose another name.")
    if out.is_mount():
        # OUT.part is renamed to OUT, and nothing can be renamed to the top of a disk.
        raise UserError(f"--out {out} is the top of a disk; name a folder below it: --out {out / 'shards'}.")
    return out


def is_done(folder: Path) -> bool:
    """Tell whether a folder's manifest, which is written last, is there."""
    return (folder / MANIFEST).is_file()


class ClaimedError(UserError):
    """Another process works in a folder."""


def is_claimed(part: Path, *, rank: int) -> bool:
    """Tell whether another process works in a folder as this rank."""
    try:
        with _lock_file(part, rank).open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # it is gone, or its disk has no locks
        return False
    return False


def _lock_file(part: Path, rank: int) -> Path:
    return part / RANKS / f"{rank}.lock"


@contextmanager
def claimed(part: Path, *, rank: int) -> Iterator[None]:
    """Keep a second preparation out of a folder.

    Raises:
        ClaimedError: another process works there as the same rank.
    """
    with locked(_lock_file(part, rank), folder=part):
        yield


@contextmanager
def locked(file: Path, *, folder: Path) -> Iterator[None]:
    """Keep other processes that lock the same file out of a folder, in which it is.

    Raises:
        ClaimedError: another process works there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # By lockf, not flock: a decoding process that outlives this one must not hold its lock.
    with file.open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            raise ClaimedError(
                f"{folder} is being written by {lock.read() or 'another process'}. Wait for it, or choose another"
                " --out."
            ) from error
        except OSError as error:
            # Some network disks have no locks at all.
            logger.warning(
                "%s cannot be locked (%s): nothing keeps a second process out.", folder, error.strerror
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}")
        lock.flush()
        yield


@contextmanager
def saying_full_disk(part: Path) -> Iterator[None]:
    """Say of a full disk which folder is on it: the errors of most writes name no file.

    Raises:
        CheckpointError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise CheckpointError(
            f"{part} cannot be written: {error.strerror}. Free some space, and run the same command to resume."
        ) from error


def publish(part: Path, out: Path) -> None:
    """Remove what only the preparation needed, and rename a complete OUT.part to OUT.

    A kill at any place leaves a folder of which this can be done again: its manifest says that it is complete.
    """
    try:
        sweep(part)
        if out.exists():
            out.rmdir()
        part.rename(out)
    except FileNotFoundError:
        # The lock is let go of before this, because some disks rename no folder with an open file in it. So a second
        # process may have done the same in between.
        if not is_done(out):
            raise


def sweep(folder: Path) -> None:
    """Remove what only the preparation needed from a complete folder.

    OUT itself is swept too: an older version did so after the rename, and may have been killed there.
    """
    for split in {unit.parent for unit in folder.glob("*/unit_*")}:
        _keep_listed_units(split)
    for name in WORKING:
        shutil.rmtree(folder / name, ignore_errors=True)
    # What a killed process had only begun to write.
    for begun in folder.rglob(".*"):
        begun.unlink()
    (folder / ARGUMENTS).unlink(missing_ok=True)


def _keep_listed_units(folder: Path) -> None:
    """Remove the units that a split's index does not list, and the units' own indexes."""
    index = folder / "index.json"
    listed = set()
    if index.is_file():
        shards = read_json(index)["shards"]
        listed = {PurePosixPath(shard["raw_data"]["basename"]).parts[0] for shard in shards}
    for unit in folder.iterdir() if folder.is_dir() else ():
        if unit.is_dir() and unit.name not in listed:
            shutil.rmtree(unit)
    # Streaming's own merge_index would count the samples of units with an index twice.
    for of_unit in folder.glob("*/index.json"):
        of_unit.unlink()
    if folder.is_dir() and not listed:
        folder.rmdir()


def read_arguments(part: Path) -> dict[str, object]:
    """Read what a preparation was begun with; that of a complete one is in its manifest."""
    if is_done(part):
        arguments: dict[str, object] = read_json(part / MANIFEST)["arguments"]
        return arguments
    return json.loads((part / ARGUMENTS).read_text())  # type: ignore[no-any-return]  # we wrote it
