"""Folders of pictures: .txt captions beside them, or Hugging Face's imagefolder metadata."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from t2i.data.pairs.pair import IMAGE_SUFFIXES, Entry, read_file
from t2i.errors import DataError

METADATA_KINDS = {"metadata.jsonl": "json", "metadata.csv": "csv", "metadata.parquet": "parquet"}
CAPTION_COLUMNS = ("text", "caption")


def read_text_folder(left_out: Counter[str], *, folder: Path) -> Iterator[Entry]:
    """Pair every picture below `folder` with the .txt file of the same stem beside it."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        caption_file = path.with_suffix(".txt")
        if not caption_file.is_file():
            left_out["no .txt caption beside the picture"] += 1
            continue
        caption = caption_file.read_text(encoding="utf-8", errors="replace")
        yield Entry(path.relative_to(folder).as_posix(), caption, partial(read_file, path))


def find_metadata(folder: Path) -> Path | None:
    """Look for imagefolder's metadata; None if the folder has none."""
    return next((folder / name for name in METADATA_KINDS if (folder / name).is_file()), None)


def read_image_folder(left_out: Counter[str], *, metadata: Path, caption_key: str) -> Iterator[Entry]:
    """Read rows of file_name and a caption (text, caption, or caption_key), in order of file_name.

    Raises:
        DataError: a column is missing.
    """
    from datasets import load_dataset

    folder = metadata.parent
    rows = load_dataset(METADATA_KINDS[metadata.name], data_files=str(metadata), split="train")
    candidates = (caption_key,) if caption_key else CAPTION_COLUMNS
    column = next((name for name in candidates if name in rows.column_names), None)
    if column is None or "file_name" not in rows.column_names:
        wanted = f"file_name and one of {', '.join(candidates)}"
        raise DataError(f"{metadata} has the columns {', '.join(rows.column_names)}; wanted are {wanted}.")
    for row in sorted(rows, key=lambda row: str(row["file_name"])):
        name = str(row["file_name"])
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
        if not inside or not (folder / name).is_file():
            left_out["metadata names a file that is not in the folder"] += 1
            continue
        yield Entry(name, row[column], partial(read_file, folder / name), facts=row)
