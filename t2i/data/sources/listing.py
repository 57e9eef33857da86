"""What a source consisted of when its preparation began, so that a source that changed since is never mixed in.

source.npy holds, for each pair of a folder or each tar, table or file of codes, the hash of its name, the hash of what
stands for its content (caption and size), and its time of change. Contents are not read: that would take as long as
the preparation. So the same name, caption and size with another time is warned of and not refused, as copies of a
source have other times too.
"""

import hashlib
import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from t2i.data.sources.source import Listed, Source
from t2i.errors import DataError
from t2i.files import write_bytes_whole

logger = logging.getLogger(__name__)

LISTING = "source.npy"
NAME, CONTENT, TIME = range(3)
"""Columns of the table."""


@dataclass(frozen=True)
class Listing:
    """What a source consists of, in order."""

    table: np.ndarray
    """(N, 3) uint64: NAME, CONTENT and TIME; a TIME of 0 if there is no file."""
    names: tuple[str, ...] = ()
    """Empty if it was read from a file."""

    @cached_property
    def fingerprint(self) -> str:
        """Number of entries and hash of their names and contents, without times."""
        digest = hashlib.sha256(np.ascontiguousarray(self.table[:, :TIME]).tobytes()).hexdigest()
        return f"{len(self.table)} entries, {digest[:32]}"

    def write(self, folder: Path) -> None:
        """Write source.npy, whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, self.table)
        write_bytes_whole(folder / LISTING, buffer.getvalue())


def list_source(source: Source) -> Listing:
    """List a source as it is now."""
    return make_listing(source.listing())


def make_listing(entries: Iterable[Listed]) -> Listing:
    """Hash names and contents of entries, in order."""
    names, rows = [], []
    for entry in entries:
        size, time = _stamp(entry.file)
        names.append(entry.name)
        rows.append((_hash(entry.name), _hash(f"{entry.text}\0{size}"), time))
    return Listing(np.array(rows, dtype=np.uint64).reshape(-1, 3), tuple(names))


def read_listing(folder: Path) -> Listing | None:
    """Read source.npy; None if it is missing or broken."""
    try:
        table = np.load(folder / LISTING, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return (
        Listing(table) if table.ndim == 2 and table.shape[1:] == (3,) and table.dtype == np.uint64 else None
    )


def check_same_listing(folder: Path, fingerprint: object, now: Listing, *, source: str) -> None:
    """Check that a source is what it was when a folder was begun or made; warn of files of another time.

    Raises:
        DataError: it changed; the message counts what was added, removed and changed.
    """
    is_begun = folder.name.endswith(".part")
    before = read_listing(folder)
    if fingerprint == now.fingerprint:
        if before is not None and before.fingerprint == fingerprint:
            _warn_of_times(folder, before, now, source=source)
        return
    what = _difference(before, now) if before is not None else f"{fingerprint} then, {now.fingerprint} now"
    advice = (
        f"Put it back as it was and run the same command, or remove {folder} to begin anew"
        if is_begun
        else f"{folder} stays as it is. For the source of today choose another --out, or move {folder} away and run the"
        " same command"
    )
    raise DataError(
        f"--source {source} has changed since {folder} was {'begun' if is_begun else 'made'}: {what}. {advice}."
    )


def _difference(before: Listing, now: Listing) -> str:
    old = dict(zip(before.table[:, NAME].tolist(), before.table[:, CONTENT].tolist(), strict=True))
    new = dict(zip(now.table[:, NAME].tolist(), now.table[:, CONTENT].tolist(), strict=True))
    names = dict(zip(now.table[:, NAME].tolist(), now.names, strict=True))
    added = [names[one] for one in new if one not in old]
    changed = [names[one] for one in new if one in old and old[one] != new[one]]
    num_removed = sum(one not in new for one in old)
    parts = [f"{num_removed} removed"] if num_removed else []
    parts += [
        f"{len(some)} {what} (such as {some[0]})"
        for what, some in (("added", added), ("changed", changed))
        if some
    ]
    return ", ".join(parts) or "the order of its entries, or how often one comes"


def _warn_of_times(folder: Path, before: Listing, now: Listing, *, source: str) -> None:
    places = np.flatnonzero(before.table[:, TIME] != now.table[:, TIME])
    if len(places):
        logger.warning(
            "%d files of --source %s (such as %s) have another time of change than when %s was begun. If they are"
            " another content of the same size, prepare into another --out.",
            len(places), source, now.names[places[0]], folder,
        )  # fmt: skip


def _stamp(file: Path | None) -> tuple[int, int]:
    """Return a file's size and time of change; zeros without a file, or if it is gone."""
    try:
        found = file.stat() if file else None
    except OSError:
        found = None
    return (found.st_size, found.st_mtime_ns) if found else (0, 0)


def _hash(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass"))
