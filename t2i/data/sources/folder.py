"""Folders of images, with .txt captions beside them or with Hugging Face's imagefolder metadata."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from t2i.data.sources.image import read_image_file
from t2i.data.sources.source import IMAGE_SUFFIXES, Entry, Tally, file_inside
from t2i.data.sources.tables import read_table_rows
from t2i.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption")


def read_text_folder(tally: Tally, *, folder: Path) -> Iterator[Entry]:
    """List every image below `folder` with the .txt file of the same stem beside it."""
    # Sorted, because a file system lists files in any order, and units must be the same on every rank.
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        tally.seen += 1
        caption_file = path.with_suffix(".txt")
        if not caption_file.is_file():
            tally.left_out["no .txt caption beside the image"] += 1
            continue
        caption = caption_file.read_text(encoding="utf-8", errors="replace")
        yield Entry(path.relative_to(folder).as_posix(), caption, partial(read_image_file, path), file=path)


def find_metadata(folder: Path) -> Path | None:
    """Find imagefolder's metadata; None if the folder has none."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def read_image_folder(tally: Tally, *, metadata: Path, caption_key: str) -> Iterator[Entry]:
    """List the rows of imagefolder's metadata (file_name and a caption), in order of file_name.

    Raises:
        DataError: the metadata is broken, or a column is missing.
    """
    folder = metadata.parent
    # Not by `datasets`: here a broken line has a number, the caption `007` stays text, and no second copy
    # of the table is written to a cache.
    rows = list(read_table_rows(metadata))
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    candidates = (caption_key,) if caption_key else CAPTION_COLUMNS
    column = next((name for name in candidates if name in columns), None)
    if column is None or "file_name" not in columns:
        wanted = f"file_name and one of {', '.join(candidates)}"
        raise DataError(f"{metadata} has the columns {', '.join(columns)}; expected {wanted}.")
    for row in sorted(rows, key=lambda row: str(row.get("file_name"))):
        tally.seen += 1
        # Metadata may come from a stranger: a name that leads out of the folder is left out.
        path = file_inside(folder, str(row.get("file_name")))
        if path is None:
            tally.left_out["metadata names a file that is not in the folder"] += 1
            continue
        yield Entry(
            str(row["file_name"]), row.get(column), partial(read_image_file, path), facts=row, file=path
        )
