"""Parquet files with image bytes: a column of bytes, or Hugging Face's struct of bytes and path.

A unit is a run of whole row groups of one file. Listing reads only the small columns. An image is read with its row
group, which stays in memory while the other images of the group are opened.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from t2i.config import SourceConfig
from t2i.data.sources.caption import LeftOut
from t2i.data.sources.cell import open_cell
from t2i.data.sources.folder import CAPTION_COLUMNS
from t2i.data.sources.image import OpenedImage
from t2i.data.sources.source import Entry, ReadEntries, Tally, key_text
from t2i.data.sources.tables import choose_column, parquet_errors

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
KEY_COLUMN = "key"
STATUS_COLUMN = "status"
"""img2dataset keeps the rows that it could not download, and says why in this column."""


@dataclass(frozen=True)
class Columns:
    """The columns of a file that are read."""

    image: str
    caption: str
    small: tuple[str, ...]
    """All but the image's."""
    labels: tuple[str, ...] = ()
    """Names of the classes, if the caption is the number of a class."""


def units_of_tables(
    prefixes: dict[Path, str], num_pairs: int, *, config: SourceConfig, has_bare_keys: bool = False
) -> list[ReadEntries]:
    """Split each file into runs of row groups of at least `num_pairs` rows, reading only the footers.

    Args:
        prefixes: the files in order, and what their keys begin with.
        has_bare_keys: whether the column `key` is the whole key, and the file's name the prefix, as in 0.1.

    Raises:
        DataError: a file is not parquet, or lacks a column.
    """
    units: list[ReadEntries] = []
    for path, prefix in prefixes.items():
        # Whole row groups, because parquet cannot read less than one of a column.
        groups: list[int] = []
        num_rows = 0
        with parquet_errors(path):
            footer = pq.read_metadata(path)
            schema = footer.schema.to_arrow_schema()
        read = partial(read_row_groups, path=path, columns=_columns(path, schema, config))
        read = partial(read, prefix="" if has_bare_keys else prefix)
        for group in range(footer.num_row_groups):
            groups.append(group)
            num_rows += footer.row_group(group).num_rows
            if num_rows >= num_pairs or group == footer.num_row_groups - 1:
                units.append(partial(read, groups=tuple(groups)))
                groups, num_rows = [], 0
    return units


def read_row_groups(
    tally: Tally, *, path: Path, prefix: str, groups: tuple[int, ...], columns: Columns
) -> Iterator[Entry]:
    """List the rows of some row groups; keys are PREFIX/KEY by the column `key`, else PREFIX/GROUP/ROW."""
    with parquet_errors(path):
        file = pq.ParquetFile(path)
    for group in groups:
        with parquet_errors(path):
            rows = _as_bytes(file.read_row_group(group, columns=list(columns.small), use_threads=False))
        tally.seen += len(rows)
        for place, row in enumerate(rows):
            key = row.get(KEY_COLUMN)
            name = f"{prefix or path.stem}/{group}/{place}"
            if key is not None:
                name = f"{prefix}/{key_text(key)}" if prefix else key_text(key)
            image = partial(
                read_cell, path, group, place, column=columns.image, status=row.get(STATUS_COLUMN)
            )
            caption = named_class(row[columns.caption], columns.labels)
            yield Entry(name, caption, image, facts=row)


def read_cell(path: Path, group: int, place: int, *, column: str, status: object) -> OpenedImage:
    """Decode the image of one cell.

    Raises:
        LeftOut: the cell holds no bytes.
    """
    try:
        return open_cell(_images(path, group, column)[place].as_py())
    except LeftOut as reason:
        is_known = isinstance(status, bytes) and status != b"success"
        raise LeftOut(f"{reason} (status {key_text(status)})" if is_known else str(reason)) from None


def named_class(value: object, labels: tuple[str, ...]) -> object:
    """Return the name of a class for its number; -1 stands for none."""
    if not labels or not isinstance(value, int):
        return value
    return labels[value] if 0 <= value < len(labels) else None


def _columns(path: Path, schema: pa.Schema, config: SourceConfig) -> Columns:
    """Choose the columns to read."""
    choose = partial(choose_column, schema.names, where=str(path))
    image = choose(asked=config.image_key, usual=IMAGE_COLUMNS, flag="--image-key")
    caption = choose(asked=config.caption_key, usual=CAPTION_COLUMNS, flag="--caption-key")
    small = [caption]
    for name, flag in ((config.pair_key, "--pair-key"), (config.score_key, "--score-key")):
        if name:
            small.append(choose(asked=name, usual=(), flag=flag))
    small += [name for name in (KEY_COLUMN, STATUS_COLUMN) if schema.names.count(name) == 1]
    return Columns(image, caption, tuple(dict.fromkeys(small)), _labels(schema, caption))


def _labels(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Read the names of a column's classes, which Hugging Face's datasets keep beside the schema."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError):
        return ()


def _as_bytes(table: pa.Table) -> list[dict[str, object]]:
    """Return a table's rows, with texts as bytes: a text that is not UTF-8 would end the whole group."""
    for place, column in enumerate(table.schema):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            texts = table.column(place).cast(kind).cast(pa.large_binary())
            table = table.set_column(place, column.name, texts)
    rows: list[dict[str, object]] = table.to_pylist()
    return rows


# Two groups: a task of pairs may begin in one and end in the next.
@lru_cache(maxsize=2)
def _images(path: Path, group: int, column: str) -> pa.ChunkedArray:
    """Read the images of one row group as an Arrow column."""
    with parquet_errors(path):
        return pq.ParquetFile(path).read_row_group(group, columns=[column], use_threads=False).column(column)
