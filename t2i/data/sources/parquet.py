"""Parquet files with image bytes: a column of bytes, or Hugging Face's struct of bytes and path.

A unit is a run of whole row groups of one file. Listing reads only the small columns. An image is read with its row
group, which stays in memory while the other images of the group are opened.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from t2i.config import SourceConfig
from t2i.data.sources.folder import CAPTION_COLUMNS
from t2i.data.sources.image import OpenedImage, decode_image
from t2i.data.sources.source import Entry, ReadEntries, Tally, parquet_errors
from t2i.errors import DataError

IMAGE_COLUMNS = ("image", "jpg", "png", "webp")
KEY_COLUMN = "key"


def units_of_tables(paths: list[Path], num_pairs: int, *, config: SourceConfig) -> list[ReadEntries]:
    """Split each file into runs of row groups of at least `num_pairs` rows, reading only the footers.

    Raises:
        DataError: a file is not parquet, or lacks a column.
    """
    units: list[ReadEntries] = []
    for path in paths:
        # Whole row groups, because parquet cannot read less than one of a column.
        groups: list[int] = []
        num_rows = 0
        footer = _footer(path)
        columns = _columns(path, footer.schema.to_arrow_schema().names, config)
        for group in range(footer.num_row_groups):
            groups.append(group)
            num_rows += footer.row_group(group).num_rows
            if num_rows >= num_pairs or group == footer.num_row_groups - 1:
                units.append(partial(read_row_groups, path=path, groups=tuple(groups), columns=columns))
                groups, num_rows = [], 0
    return units


def read_row_groups(
    tally: Tally, *, path: Path, groups: tuple[int, ...], columns: dict[str, str]
) -> Iterator[Entry]:
    """List the rows of some row groups; keys are from the column `key`, else FILE/GROUP/ROW."""
    small = [name for role, name in columns.items() if role != "image"]
    with parquet_errors(path):
        file = pq.ParquetFile(path)
    for group in groups:
        with parquet_errors(path):
            rows = file.read_row_group(group, columns=small, use_threads=False).to_pylist()
        tally.seen += len(rows)
        for place, row in enumerate(rows):
            key, at = row.get(KEY_COLUMN), f"{path.stem}/{group}/{place}"
            picture = partial(read_cell, path, group, place, columns["image"])
            yield Entry(at if key is None else str(key), row[columns["caption"]], picture, facts=row)


def read_cell(path: Path, group: int, place: int, column: str) -> OpenedImage:
    """Decode the image of one cell.

    Raises:
        ValueError: the cell holds no bytes.
    """
    return decode_image(image_bytes(_images(path, group, column)[place].as_py()))


def image_bytes(cell: object) -> bytes:
    """Return the bytes of a cell, which holds them or a struct of bytes and path."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise ValueError(f"expected image bytes, found {type(data).__name__}")
    return data


def choose_column(names: list[str], *, asked: str, usual: tuple[str, ...], where: str, flag: str) -> str:
    """Find the column that was asked for, else the first of the usual ones.

    Raises:
        DataError: there is none.
    """
    candidates = (asked,) if asked else usual
    found = next((name for name in candidates if name in names), None)
    if found is None:
        wanted = ", ".join(candidates)
        raise DataError(f"{where} has the columns {', '.join(names)}; expected one of {wanted} ({flag}).")
    return found


def _columns(path: Path, names: list[str], config: SourceConfig) -> dict[str, str]:
    """Choose the columns to read, by role."""
    chosen = {
        "image": choose_column(
            names, asked=config.image_key, usual=IMAGE_COLUMNS, where=str(path), flag="--image-key"
        ),
        "caption": choose_column(
            names, asked=config.caption_key, usual=CAPTION_COLUMNS, where=str(path), flag="--caption-key"
        ),
    }
    for role, name, flag in (
        ("pair", config.pair_key, "--pair-key"),
        ("score", config.score_key, "--score-key"),
    ):
        if name:
            chosen[role] = choose_column(names, asked=name, usual=(), where=str(path), flag=flag)
    return chosen | ({"key": KEY_COLUMN} if KEY_COLUMN in names else {})


def _footer(path: Path) -> pq.FileMetaData:
    with parquet_errors(path):
        return pq.read_metadata(path)


# Two groups: a task of pairs may begin in one and end in the next.
@lru_cache(maxsize=2)
def _images(path: Path, group: int, column: str) -> pa.ChunkedArray:
    """Read the images of one row group as an Arrow column."""
    with parquet_errors(path):
        return pq.ParquetFile(path).read_row_group(group, columns=[column], use_threads=False).column(column)
