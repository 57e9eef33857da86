"""Disks as they are: some keep no modes, some hold on to what is open, some know no sync of a folder."""

import errno
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from t2i.errors import CheckpointError

PAUSES = (0.05, 0.2, 0.8)
"""Seconds before a file that is open elsewhere is tried again."""


def put_in_place(written: Path, path: Path) -> None:
    """Rename a written file to `path`, over the file that may be there.

    Raises:
        CheckpointError: the file there cannot be replaced.
    """
    for pause in (*PAUSES, None):
        try:
            written.replace(path)
            return
        except OSError as error:
            # Windows and some network file systems refuse while anybody reads the old file.
            is_held = error.errno in (errno.EACCES, errno.EPERM, errno.EBUSY, errno.ETXTBSY) and path.exists()
            if not is_held:
                raise
            if pause is None:
                raise CheckpointError(
                    f"{path} cannot be replaced: {error.strerror}. Is it open in another program?"
                ) from error
            time.sleep(pause)


def share(path: Path) -> None:
    """Give a file, or all files below a folder, the mode of new files, but let nobody else write to them."""
    # safetensors makes files that their owner alone may read. Files that anyone may write are never resumed from.
    probe = (path if path.is_dir() else path.parent) / f".mode.{os.uname().nodename}.{os.getpid()}"
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
        probe.unlink()
    for one in (path, *(path.rglob("*") if path.is_dir() else ())):
        if one.is_symlink():
            continue
        found = one.stat().st_mode
        # A file that can be run stays one.
        wanted = stat.S_IMODE((found if one.is_dir() else mode | (found & 0o111)) & ~stat.S_IWOTH)
        if wanted != stat.S_IMODE(found):
            with suppress(OSError):  # some file systems keep no modes
                one.chmod(wanted)


def sync(path: Path) -> None:
    """Push a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync files, but know no sync of a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)):
            raise
    finally:
        os.close(descriptor)
