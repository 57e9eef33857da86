"""Published lists of captions: a column of a table, or the lines of a text file."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from t2i.data.sources.caption import LeftOut, read_captions
from t2i.data.sources.tables import TABLES, read_table_rows
from t2i.errors import DataError
from t2i.files import is_file, lines_of

logger = logging.getLogger(__name__)

LISTS = (".txt", *TABLES)
LIST_COLUMNS = ("caption", "text", "prompt")
IMAGE_ID_COLUMNS = ("image_id", "coco_id", "uid", "file_name")
"""Columns that name a caption's image in published lists of COCO's captions; upper or lower case."""

IMAGE_ID = re.compile(r"(\d+)(?:_mscoco_\d+)?|(?:.*[_/])?(\d+)\.(?:jpg|png|0)")
"""Matches 391895, 391895.0, COCO_val2014_000000391895.jpg and 391895_mscoco_0."""


@dataclass(frozen=True)
class ListedCaption:
    """One row of a list."""

    text: str
    """On one line."""
    image_id: int | None
    """COCO's id of the image; None if the list has no column for it."""


def read_caption_list(file: Path) -> list[ListedCaption]:
    """Read the rows of a list in order.

    Raises:
        DataError: the file is missing or of another type, or a row has no caption or no valid image id.
    """
    if file.suffix not in LISTS or not is_file(file):
        found = "is no file" if file.suffix in LISTS else f"ends in {file.suffix or 'nothing'}"
        raise DataError(f"the caption list {file} {found}; expected a file that ends in {', '.join(LISTS)}.")
    listed = list(_lines(file) if file.suffix == ".txt" else _rows(file))
    if not listed:
        raise DataError(f"{file} lists no caption.")
    return listed


def _lines(file: Path) -> Iterator[ListedCaption]:
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark first, which would be part of the first caption.
        lines = lines_of(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}.") from error
    empty = sum(not line.strip() for line in lines)
    if empty:
        logger.warning("%s: %d empty lines are no captions, and are not counted.", file, empty)
    yield from (ListedCaption(" ".join(line.split()), None) for line in lines if line.strip())


def _rows(file: Path) -> Iterator[ListedCaption]:
    for number, row in enumerate(read_table_rows(file), 1):
        columns = {str(name).strip().lower(): name for name in row}
        caption = next((columns[name] for name in LIST_COLUMNS if name in columns), None)
        image = next((columns[name] for name in IMAGE_ID_COLUMNS if name in columns), None)
        if caption is not None and row[caption] in ("", None):
            raise DataError(f"{file}: the {caption} of row {number} is empty; expected a caption.")
        if caption is None:
            wanted = ", ".join(LIST_COLUMNS)
            found = ", ".join(map(str, row))
            raise DataError(
                f"{file}: row {number} has the columns {found}; expected a caption in one of {wanted}."
            )
        try:
            text = read_captions(row[caption], takes_all=False, encoding="utf-8")[0].text
        except LeftOut as reason:
            raise DataError(f"{file}: row {number} cannot be used: {reason}.") from reason
        yield ListedCaption(
            text, None if image is None else _image_id(row[image], where=f"{file}: row {number}")
        )


def _image_id(value: object, *, where: str) -> int:
    found = IMAGE_ID.fullmatch(str(value))
    if found is None:
        raise DataError(f"{where} names the image {value!r:.80}; expected a COCO image id such as 391895.")
    return int(found[1] or found[2])
