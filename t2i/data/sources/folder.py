"""Folders of images, with .txt captions beside them or with a table that names them, such as imagefolder's metadata."""

import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

from t2i.data.sources.caption import MAX_TEXT_BYTES, LeftOut, TextFile
from t2i.data.sources.image import IMAGE_SUFFIXES, OF_THE_DISK, is_image_file, read_image_file
from t2i.data.sources.source import Entry, Tally, key_text
from t2i.data.sources.tables import choose_column, is_url, read_table_rows
from t2i.errors import DataError
from t2i.files import is_inside

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption")
NAME_COLUMNS = ("file_name",)
LABEL = "label"
"""The value of --caption-key that makes the names of class folders captions."""


def read_text_folder(tally: Tally, *, folder: Path, caption_key: str) -> Iterator[Entry]:
    """List every image below `folder` with the caption file of the same stem, or of the whole name, beside it.

    Args:
        caption_key: ending of the caption files, else txt; `label` for the name of the folder that an image is in.
    """
    ending = f".{caption_key or 'txt'}".lower()
    captions: dict[Path, Path] = {}
    images: list[Path] = []
    for path in list_files(folder, tally):
        stem = path.name[: -len(ending)]
        if path.name.lower().endswith(ending) and captions.setdefault(path.with_name(stem), path) == path:
            continue
        if is_image_file(path):
            images.append(path)
        else:
            tally.unread[other_kind(path)] += 1
    has_labels = caption_key == LABEL and not captions
    for path in images:
        tally.seen += 1
        key, opened = path.relative_to(folder).as_posix(), partial(read_image_file, path)
        if has_labels:
            yield Entry(key, None if path.parent == folder else path.parent.name, opened, file=path)
            continue
        file = captions.get(path.with_suffix("")) or captions.get(path)
        if file is None:
            tally.left_out[f"no {ending} caption beside the image"] += 1
            continue
        try:
            yield Entry(key, _caption_of(file), opened, file=path)
        except LeftOut as reason:
            tally.left_out[str(reason)] += 1
    stems = {*images, *(path.with_suffix("") for path in images)}
    alone = sum(stem not in stems for stem in captions)
    tally.seen += alone
    if alone:
        tally.left_out["no image beside the caption"] += alone


def _caption_of(file: Path) -> TextFile:
    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise LeftOut(f"a text over {MAX_TEXT_BYTES} bytes")
        return TextFile(file.read_bytes())
    except OSError as error:
        if error.errno in OF_THE_DISK:
            raise
        raise LeftOut(f"a caption file that cannot be read ({error.strerror})") from error


def find_metadata(folder: Path) -> Path | None:
    """Find imagefolder's metadata; None if the folder has none."""
    return next((path for name in METADATA if (path := file_inside(folder, name))), None)


def read_image_folder(
    tally: Tally, *, table: Path, caption_key: str, image_key: str, takes_all: bool = False
) -> Iterator[Entry]:
    """List the rows of a table that names images (file_name and a caption), in order of their names.

    Several rows of one image are captions of it: their keys are NAME, NAME#1, ..., and they stay in one split.

    Args:
        takes_all: each caption of a list will be an entry, and has a number too.

    Raises:
        DataError: the table is broken, or a column is missing.
    """
    folder = table.parent
    # Not by `datasets`: here a broken line has a number, the caption `007` stays text, and no second copy
    # of the table is written to a cache.
    rows = list(read_table_rows(table))
    if not rows:
        raise DataError(f"{table} has no rows.")
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    text = choose_column(
        columns, asked=caption_key, usual=CAPTION_COLUMNS, where=str(table), flag="--caption-key"
    )
    name = choose_column(columns, asked=image_key, usual=NAME_COLUMNS, where=str(table), flag="--image-key")
    num_rows: dict[Path, int] = {}
    first_keys: dict[Path, str] = {}
    tally.seen += len(rows)
    for row in sorted(rows, key=lambda row: str(row.get(name))):
        # The table may come from a stranger: a name that leads out of the folder is left out.
        found = _named_file(folder, row.get(name))
        if isinstance(found, str):
            tally.left_out[found] += 1
            continue
        caption = row.get(text)
        number = num_rows.get(found, 0)
        num_rows[found] = number + (
            len(caption) if takes_all and isinstance(caption, list) and caption else 1
        )
        # One image under two spellings (a.jpg, ./a.jpg) is one image.
        key = first_keys.setdefault(found, key_text(row[name]))
        yield Entry(
            f"{key}#{number}" if number else key,
            caption,
            partial(read_image_file, found),
            facts=row,
            # The key of the first row: an image keeps its split when captions are added.
            group=key,
            file=found,
        )
    _count_others(tally, folder, table=table, named=num_rows)


def list_files(folder: Path, tally: Tally) -> list[Path]:
    """List the regular files below a folder, sorted; count what is not read, such as links that lead out of it."""
    root = os.path.realpath(folder)
    found: list[Path] = []
    pending = [folder]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    reason = _refusal(entry, root)
                    if reason:
                        tally.unread[reason] += 1
                    else:
                        (pending if entry.is_dir() else found).append(Path(entry.path))
        except OSError as error:
            if error.errno in OF_THE_DISK:
                raise
            tally.unread[f"a folder that cannot be read ({error.strerror})"] += 1
    # A file system lists files in any order, and units must be the same on every rank.
    return sorted(found)


def file_inside(folder: Path, name: str) -> Path | None:
    """Find a file by the name that a list gives it; None if it does not exist or lies outside the folder."""
    try:
        path = folder / name
        if not is_inside(name) or not path.is_file() or not _is_below(path.parent, folder):
            return None
        return path if not path.is_symlink() or _is_below(path, folder) else None
    except ValueError:
        return None
    except OSError as error:
        if error.errno in OF_THE_DISK:
            raise
        return None  # the file system refuses the name, for example because it is too long


# A folder of a million images has few folders, and each look-up asks the disk for every part of the path.
@lru_cache(maxsize=4_096)
def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def other_kind(path: Path) -> str:
    """Describe a file that is neither an image nor a caption, for Tally.unread."""
    return f"a file of another kind ({path.suffix.lower() or 'no ending'})"


def _named_file(folder: Path, name: object) -> Path | str:
    """Find the file that a row names, or return the reason that it is not read."""
    if name is None or name == "":
        return "a row that names no file"
    if is_url(name):
        return "a row that names an address; images are not downloaded (img2dataset does that)"
    return file_inside(folder, str(name)) or "metadata names a file that is not in the folder"


def _refusal(entry: os.DirEntry[str], root: str) -> str:
    """Return the reason that a file or folder is not read; empty if it is."""
    if entry.name.startswith(".") or entry.name == "__MACOSX":
        return "a hidden file or folder"
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if os.path.commonpath([root, target]) != root:
            return "a link that leads out of the folder"
        if Path(target).is_dir():
            return "a link to a folder"
        return "" if Path(target).is_file() else "a link to nothing"
    return "" if entry.is_dir() or entry.is_file() else "neither a file nor a folder"


def _count_others(tally: Tally, folder: Path, *, table: Path, named: dict[Path, int]) -> None:
    """Count the files of the folder that the table does not name."""
    for path in list_files(folder, tally):
        if path in named or path == table:
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            tally.seen += 1
            tally.left_out["an image that the metadata does not name"] += 1
        else:
            tally.unread[other_kind(path)] += 1
