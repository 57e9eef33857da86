"""Precomputed tokens: sequences of integers below a vocabulary size, with or without captions, and no images.

DIR/ids.json holds {"vocab_size": 4096, "length": 32, "made_by": "what turned images into ids"}. The sequences are in
DIR/*.jsonl (rows of ids, with an optional caption and key), DIR/*.parquet (the same as columns) and DIR/*.npy (integers
(N, length), with captions as the lines of NAME.txt). Each file is one unit.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from t2i.data.sources.image import OpenedImage
from t2i.data.sources.source import GivenIds, Pair, Tally, caption_text
from t2i.errors import DataError
from t2i.files import lines_of

FACTS = "ids.json"


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
        DataError: it is missing, or has other keys.
    """
    try:
        facts = GivenIds(**json.loads((folder / FACTS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        wanted = '{"vocab_size": 4096, "length": 32, "made_by": "a name"}'
        raise DataError(f"ids:{folder}: {FACTS} cannot be used ({error}); expected {wanted}") from error
    return facts


def files_of_ids(folder: Path) -> list[Path]:
    """List the files of sequences, each of which is one unit, in order of their names.

    Raises:
        DataError: there is none.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in READERS)
    if not files:
        raise DataError(f"ids:{folder} has no file of {', '.join(READERS)}.")
    return files


def read_ids(tally: Tally, *, path: Path, facts: GivenIds) -> Iterator[Pair]:
    """Read one file's sequences; keys are from the row, else FILE/ROW, and captions may be empty."""
    for place, row in enumerate(READERS[path.suffix](path)):
        tally.seen += 1
        codes = np.asarray(row["ids"])
        if codes.shape != (facts.length,) or codes.dtype.kind not in "iu":
            tally.left_out[f"not {facts.length} integers"] += 1
        elif codes.min() < 0 or codes.max() >= facts.vocab_size:
            tally.left_out[f"an id outside 0 to {facts.vocab_size - 1}"] += 1
        else:
            key = str(row.get("key") or f"{path.stem}/{place}")
            yield Pair(key, caption_text(row.get("caption")), split="", open=NoImage(key), codes=codes)


def _rows_of_jsonl(path: Path) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict) or "ids" not in row:
                raise DataError(f"{path}: line {number} has no ids.")
            yield row


def _rows_of_parquet(path: Path) -> Iterator[dict[str, object]]:
    file = pq.ParquetFile(path)
    if "ids" not in file.schema_arrow.names:
        raise DataError(
            f"{path} has the columns {', '.join(file.schema_arrow.names)}; expected one named ids."
        )
    for batch in file.iter_batches(1_024):
        yield from batch.to_pylist()


def _rows_of_npy(path: Path) -> Iterator[dict[str, object]]:
    # Mapped, because a file may be larger than memory. Never as a pickle, which could run code.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    file = path.with_suffix(".txt")
    captions = lines_of(file.read_text(encoding="utf-8")) if file.is_file() else [""] * len(array)
    if len(captions) != len(array):
        raise DataError(f"{file} has {len(captions)} lines; {path.name} has {len(array)} rows.")
    yield from ({"ids": ids, "caption": caption} for ids, caption in zip(array, captions, strict=True))


READERS: dict[str, Callable[[Path], Iterable[dict[str, object]]]] = {
    ".jsonl": _rows_of_jsonl,
    ".parquet": _rows_of_parquet,
    ".npy": _rows_of_npy,
}
