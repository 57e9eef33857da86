"""Hugging Face datasets, streamed: only what is read is downloaded.

A unit is one of the dataset's own shards, usually a parquet file or a tar. A stream cannot go back to an image, so a
pair holds its image's bytes.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from t2i.config import SourceConfig
from t2i.data.sources.folder import CAPTION_COLUMNS
from t2i.data.sources.image import OpenedImage, decode_image
from t2i.data.sources.parquet import IMAGE_COLUMNS, choose_column, image_bytes
from t2i.data.sources.source import Entry, ReadEntries, Tally
from t2i.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

KEY_COLUMNS = ("key", "__key__")


def units_of_dataset(name: str, *, config: SourceConfig) -> list[ReadEntries]:
    """Open a dataset by its name or folder, and make one unit per shard.

    Raises:
        DataError: the dataset cannot be opened, or lacks a column.
    """
    # Imported here: it takes two seconds, and most sources are not from the hub.
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config.hub_subset or None, split=config.hub_split, streaming=True)
        features = dict(rows.features or next(iter(rows)))
    except (OSError, ValueError, StopIteration) as error:
        raise DataError(f"the Hugging Face dataset {name} cannot be opened: {error}") from error
    names = list(features)
    pictures = tuple(column for column in names if isinstance(features[column], ImageFeature))
    where = f"the dataset {name}"
    columns = {
        "image": choose_column(
            names, asked=config.image_key, usual=pictures or IMAGE_COLUMNS, where=where, flag="--image-key"
        ),
        "caption": choose_column(
            names,
            asked=config.caption_key,
            usual=(*CAPTION_COLUMNS, "txt"),
            where=where,
            flag="--caption-key",
        ),
    }
    # Undecoded: the dataset would decode with any of Pillow's formats, and one broken image would end the stream.
    if columns["image"] in pictures:
        rows = rows.cast_column(columns["image"], ImageFeature(decode=False))
    shards = range(rows.num_shards)
    return [partial(read_shard, rows=rows, index=index, columns=columns) for index in shards]


def read_shard(
    tally: Tally, *, rows: "IterableDataset", index: int, columns: dict[str, str]
) -> Iterator[Entry]:
    """List one shard's rows; keys are from the column `key` or `__key__`, else SHARD/ROW."""
    shard = rows.shard(num_shards=rows.num_shards, index=index)
    for place, row in enumerate(shard):
        tally.seen += 1
        key = next((row[name] for name in KEY_COLUMNS if name in row), f"{index:06d}/{place:06d}")
        cell = row.pop(columns["image"])
        yield Entry(str(key), row[columns["caption"]], partial(open_cell, cell), facts=_flat(row))


def open_cell(cell: object) -> OpenedImage:
    """Decode the image of a cell, which holds its bytes or a path that the dataset streams from."""
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        from datasets.utils.file_utils import xopen  # here: importing it takes seconds

        with xopen(cell["path"], "rb") as file:
            return decode_image(file.read())
    return decode_image(image_bytes(cell))


def _flat(row: dict[str, object]) -> dict[str, object]:
    """Merge a WebDataset row's json into the row, so that its keys are read like columns."""
    inner = row.get("json")
    return {**inner, **row} if isinstance(inner, dict) else row
