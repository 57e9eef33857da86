"""Precomputed tokens: sequences of integers below a vocabulary size, with or without captions, and no images.

DIR/ids.json holds {"vocab_size": 4096, "length": 32, "made_by": "what turned images into ids"}. The sequences are in
DIR/*.jsonl (rows of ids, with an optional caption and key), DIR/*.parquet (the same as columns) and DIR/*.npy (integers
(N, length), with captions as the lines of NAME.txt). Each file is one unit.
"""

import itertools
import tokenize
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from t2i.data.sources.caption import NO_CAPTION, CaptionLine, LeftOut, mark_of, read_captions
from t2i.data.sources.folder import list_files, other_kind
from t2i.data.sources.image import OpenedImage
from t2i.data.sources.source import GivenIds, Pair, Tally, key_text
from t2i.data.sources.tables import choose_column, parquet_errors, read_table_rows
from t2i.errors import DataError
from t2i.files import check_keys, lines_of, read_json

FACTS = "ids.json"
UNREADABLE_ARRAY = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,
    TypeError,
    OverflowError,
    tokenize.TokenError,
    zipfile.BadZipFile,
)
"""What numpy raises for files that are broken or forged."""
MAX_VOCABULARY, MAX_LENGTH = 2**31, 1_000_000


@dataclass(frozen=True)
class NoImage:
    """Stands in for opening an image."""

    key: str

    def __call__(self) -> OpenedImage:
        """Refuse to open it.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.key} has precomputed tokens and no image")


def read_facts(folder: Path) -> GivenIds:
    """Read DIR/ids.json.

    Raises:
        DataError: it is missing, or has other keys or values.
    """
    try:
        values = read_json(folder / FACTS)
        check_keys(values, {"vocab_size": int, "length": int, "made_by": str}, where=folder / FACTS)
        facts = GivenIds(**values)
        for name, value, limit in (
            ("vocab_size", facts.vocab_size, MAX_VOCABULARY),
            ("length", facts.length, MAX_LENGTH),
        ):
            if not 1 <= value <= limit:
                raise DataError(f"{name} is {value}; expected 1 to {limit:,}")
    except (DataError, TypeError) as error:
        expected = '{"vocab_size": 4096, "length": 32, "made_by": "a name"}'
        raise DataError(f"ids:{folder}: {FACTS} cannot be used ({error}); expected {expected}") from error
    return facts


def files_of_ids(folder: Path, tally: Tally) -> list[Path]:
    """List the files of sequences, each of which is one unit, in order of their names; count the other files.

    Raises:
        DataError: there is none.
    """
    listed = [path for path in list_files(folder, tally) if path.parent == folder]
    files = [path for path in listed if path.suffix in READERS]
    captions = {path.with_suffix(".txt") for path in files if path.suffix == ".npy"}
    tally.unread.update(
        other_kind(path) for path in listed if path not in {*files, *captions, folder / FACTS}
    )
    if not files:
        raise DataError(f"ids:{folder} has no file of {', '.join(READERS)}.")
    return files


def read_ids(tally: Tally, *, path: Path, facts: GivenIds, encoding: str) -> Iterator[Pair]:
    """Read one file's sequences; keys are from the row, else FILE/ROW, and captions may be empty."""
    for place, row in enumerate(READERS[path.suffix](path, facts.length)):
        tally.seen += 1
        reason = _refusal(row["ids"], facts)
        try:
            line = _caption(row.get("caption"), encoding)
        except LeftOut as refused:
            reason = reason or str(refused)
        if reason:
            tally.left_out[reason] += 1
            continue
        own = row.get("key")
        key = key_text(own) if isinstance(own, str | int) and own != "" else f"{path.stem}/{place}"
        codes = np.asarray(row["ids"])
        yield Pair(key, line.text, split="", open=NoImage(key), changed=line.changed, codes=codes)


def _refusal(ids: object, facts: GivenIds) -> str:
    """Return the reason that a sequence cannot be used; empty if it can."""
    try:
        codes = np.asarray(ids)
    except (ValueError, OverflowError):  # numpy makes no array of lists of several lengths
        codes = np.zeros(0)
    if codes.shape != (facts.length,) or codes.dtype.kind not in "iu":
        return f"not {facts.length} integers"
    if codes.min() < 0 or codes.max() >= facts.vocab_size:
        return f"an id outside 0 to {facts.vocab_size - 1}"
    return ""


def _caption(value: object, encoding: str) -> CaptionLine:
    """Read a caption, which may be missing; raises LeftOut if something else is in its place."""
    try:
        return read_captions(value, takes_all=False, encoding=encoding)[0]
    except LeftOut as reason:
        if str(reason) != NO_CAPTION:
            raise
        return CaptionLine("")


def _rows_of_jsonl(path: Path, length: int) -> Iterator[dict[str, object]]:
    for number, row in enumerate(read_table_rows(path), 1):
        if "ids" not in row:
            raise DataError(f"{path}: row {number} has no ids.")
        yield row


def _rows_of_parquet(path: Path, length: int) -> Iterator[dict[str, object]]:
    with parquet_errors(path):
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    choose_column(names, asked="ids", usual=(), where=str(path), flag="the sequences")
    wanted = [name for name in ("ids", "caption", "key") if name in names]
    with parquet_errors(path):
        for batch in file.iter_batches(1_024, columns=wanted):
            yield from batch.to_pylist()


def _rows_of_npy(path: Path, length: int) -> Iterator[dict[str, object]]:
    try:
        # Mapped, because a file may be larger than memory; a header that claims more than the file has is refused
        # then. Never as a pickle, which could run code.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE_ARRAY as error:
        raise DataError(f"{path} is not an array of numpy's, or is broken: {error}.") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.shape[1] != length:
        found = f"the shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise DataError(f"{path} has {found}; expected (N, {length}), as {FACTS} says.")
    file = path.with_suffix(".txt")
    captions: Iterable[str] = itertools.repeat("", len(array))
    if file.is_file():
        data = file.read_bytes()
        lines = lines_of(data.decode(mark_of(data) or "utf-8", "surrogateescape"))
        if len(lines) != len(array):
            raise DataError(f"{file} has {len(lines)} lines; {path.name} has {len(array)} rows.")
        captions = lines
    yield from ({"ids": ids, "caption": caption} for ids, caption in zip(array, captions, strict=True))


READERS: dict[str, Callable[[Path, int], Iterable[dict[str, object]]]] = {
    ".jsonl": _rows_of_jsonl,
    ".parquet": _rows_of_parquet,
    ".npy": _rows_of_npy,
}
