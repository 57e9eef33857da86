"""Hugging Face datasets, from the hub or a folder, streamed: only what is read is downloaded.

A unit is one of the dataset's own shards, usually a parquet file or a tar. A stream cannot go back to an image, so a
pair holds its image's bytes.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from t2i.config import SourceConfig
from t2i.data.sources.caption import LeftOut
from t2i.data.sources.cell import FIRST_IMAGE, open_cell
from t2i.data.sources.folder import CAPTION_COLUMNS
from t2i.data.sources.image import OpenedImage, decode_image
from t2i.data.sources.parquet import IMAGE_COLUMNS, named_class
from t2i.data.sources.source import LISTED_UNIT, Entry, KeyForm, ReadEntries, Tally, key_text
from t2i.data.sources.tables import choose_column
from t2i.errors import DataError
from t2i.files import is_inside, read_optional_json

if TYPE_CHECKING:
    from datasets import IterableDataset

KEY_COLUMNS = ("key", "__key__")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files that `save_to_disk` writes: for one split, and for several."""
REFUSED = (OSError, ValueError, KeyError, TypeError, RuntimeError, StopIteration, pa.ArrowException)
"""What `datasets` raises, beside its own errors, for folders and names that it cannot open."""


def is_saved(folder: Path) -> bool:
    """Tell whether `datasets` made this folder by save_to_disk."""
    return (folder / SAVED).is_file() or (folder / SAVED_SPLITS).is_file()


def revision_of(name: str) -> str:
    """Ask the hub for the commit that a dataset is at; empty where the hub cannot be asked."""
    from huggingface_hub import HfApi  # here: most sources are not from the hub

    try:
        return HfApi().dataset_info(name).sha or ""
    except (OSError, ValueError):
        return ""


def units_of_dataset(name: str, *, config: SourceConfig, key_form: KeyForm = "row") -> list[ReadEntries]:
    """Open a dataset by its folder, or by its name on the hub, and make one unit per shard.

    Args:
        key_form: how keys are made: of a row's number in the whole where that is known, or as older shards have it.

    Raises:
        DataError: the dataset cannot be opened, or lacks a column.
    """
    # Imported here: it takes two seconds, and most sources are not from the hub.
    from datasets import ClassLabel
    from datasets import Image as ImageFeature
    from datasets.exceptions import DatasetsError

    if not Path(name).is_dir() and not HUB_NAME.fullmatch(name):
        raise DataError(f"--source hf:{name} is neither a folder nor of the form hf:USER/NAME.")
    try:
        rows, num_rows = _rows(name, config)
        features = dict(rows.features or next(iter(rows)))
    except DataError:
        raise
    except (*REFUSED, DatasetsError) as error:
        raise DataError(f"the Hugging Face dataset {name} cannot be opened: {_sentence(error)}") from error
    names = list(features)
    images = tuple(column for column in names if isinstance(features[column], ImageFeature))
    choose = partial(choose_column, names, where=f"the dataset {name}")
    image = choose(asked=config.image_key, usual=images or IMAGE_COLUMNS, flag="--image-key")
    caption = choose(asked=config.caption_key, usual=(*CAPTION_COLUMNS, "txt"), flag="--caption-key")
    kind = features[caption]
    labels = tuple(kind.names) if isinstance(kind, ClassLabel) else ()
    # Undecoded: the dataset would decode with any of Pillow's formats, and one broken image would end the stream.
    read = partial(
        read_shard,
        name=name,
        rows=rows.decode(False),
        columns=(image, caption),
        labels=labels,
        has_bare_keys=key_form == "bare",
    )
    num_rows = num_rows if key_form == "row" else None
    return [
        partial(read, index=index, first_row=_first_row(index, num_rows=num_rows, num_shards=rows.num_shards))
        for index in range(rows.num_shards)
    ]


def _first_row(index: int, *, num_rows: int | None, num_shards: int) -> int | None:
    """Compute the number of a shard's first row, as datasets cuts rows into contiguous shards; None if not known."""
    if num_rows is None:
        return None
    size, longer = divmod(num_rows, num_shards)
    return index * size + min(index, longer)


def read_shard(
    tally: Tally,
    *,
    name: str,
    rows: "IterableDataset",
    index: int,
    columns: tuple[str, str],
    labels: tuple[str, ...],
    has_bare_keys: bool,
    first_row: int | None,
) -> Iterator[Entry]:
    """List one shard's rows; keys are SHARD/KEY by the column `key` or `__key__`, else SHARD/ROW.

    Where first_row is known they are ROW/KEY or ROW, of the whole: how many shards there are depends on the rows.
    """
    from datasets.exceptions import DatasetsError

    image, caption = columns
    try:
        for place, row in enumerate(rows.shard(num_shards=rows.num_shards, index=index)):
            tally.seen += 1
            own = next((row[column] for column in KEY_COLUMNS if row.get(column) is not None), None)
            prefix = f"{index if first_row is None else first_row + place:06d}"
            if own is not None:
                key = key_text(own) if has_bare_keys else f"{prefix}/{key_text(own)}"
            else:
                key = f"{prefix}/{place:06d}" if first_row is None else prefix
            cell = row.pop(image)
            yield Entry(
                key,
                named_class(row.get(caption), labels),
                partial(open_own_cell, cell, name),
                facts=_flat(row),
            )
    except (*REFUSED, DatasetsError) as error:
        raise DataError(f"shard {index} of the dataset {name} cannot be read: {_sentence(error)}") from error


def open_own_cell(cell: object, name: str) -> OpenedImage:
    """Decode the image of a cell, which holds its bytes or a path in the dataset.

    Raises:
        LeftOut: the path leads out of the dataset.
    """
    if isinstance(cell, list) and cell:
        opened = open_own_cell(cell[0], name)
        return OpenedImage(opened.image, (*opened.changed, FIRST_IMAGE)) if len(cell) > 1 else opened
    if not isinstance(cell, dict) or cell.get("bytes") is not None or not cell.get("path"):
        return open_cell(cell)
    path = str(cell["path"])
    # A stranger's table may name any file of this machine, or any address.
    if not _is_own(path, name):
        raise LeftOut("a path that leads out of the dataset, in place of image bytes")
    from datasets.utils.file_utils import xopen  # here: importing it takes seconds

    with xopen(path, "rb") as file:
        return decode_image(file.read())


def _rows(name: str, config: SourceConfig) -> "tuple[IterableDataset, int | None]":
    """Open a dataset, and count the rows of one that was saved; None for a streamed one."""
    from datasets import Dataset, load_dataset, load_from_disk

    folder = Path(name)
    if not is_saved(folder):
        streamed = load_dataset(
            name, config.hub_subset or None, split=config.hub_split, streaming=True, trust_remote_code=False
        )
        return streamed, None
    if (folder / SAVED_SPLITS).is_file():
        splits = read_optional_json(folder / SAVED_SPLITS).get("splits")
        if not isinstance(splits, list) or config.hub_split not in splits or not is_inside(config.hub_split):
            raise DataError(f"{folder} has the splits {splits}; expected one of these as --hub-split.")
        folder /= config.hub_split
    for file in read_optional_json(folder / SAVED).get("_data_files") or []:
        if not isinstance(file, dict) or not is_inside(str(file.get("filename"))):
            raise DataError(f"{folder / SAVED} names {file!r:.80}; expected files of its folder.")
    rows = load_from_disk(folder)
    assert isinstance(rows, Dataset), "one split was chosen"
    num_shards = max(1, len(rows) // LISTED_UNIT)
    return rows.with_format(None).to_iterable_dataset(num_shards=num_shards), len(rows)


def _is_own(path: str, name: str) -> bool:
    """Tell whether a path is one of the dataset's own files, or in one of its archives (zip://FILE::ARCHIVE)."""
    file = path.rpartition("::")[2]
    folder = Path(name)
    if folder.is_dir():
        return "://" not in file and Path(file).resolve().is_relative_to(folder.resolve())
    return file.startswith(f"hf://datasets/{name}@") and ".." not in Path(file).parts


def _sentence(error: Exception) -> str:
    if isinstance(error, RuntimeError) and "script" in str(error):
        return f"it is loaded by a Python script of its own, which is never run ({error})."
    return str(error) or type(error).__name__


def _flat(row: dict[str, Any]) -> dict[str, object]:
    """Merge a WebDataset row's json into the row, so that its keys are read like columns."""
    inner = row.get("json")
    return {**inner, **row} if isinstance(inner, dict) else row
