"""(picture, caption) pairs out of what people have.

A source is named by one string: `openmoji` (the embedded set), or a folder. A folder with metadata.jsonl or
metadata.csv is read as Hugging Face's imagefolder; any other folder as pictures with .txt captions of the
same stem.
"""

import io
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

from t2i.data import openmoji
from t2i.data.hashing import hash_uniform
from t2i.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "heldout", "combinations")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_IMAGE_PIXELS = 64_000_000
"""Larger pictures are refused as decompression bombs."""

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption")


@dataclass(frozen=True)
class Pair:
    """One captioned picture, not yet read."""

    key: str
    """Unique within the source, stable over time."""
    caption: str
    split: str
    """train, heldout or combinations."""
    open: Callable[[], Image.Image] = field(compare=False)
    """Read the picture as RGB; raises OSError, ValueError or Image.DecompressionBombError if it is broken."""


@dataclass(frozen=True)
class Source:
    """Every pair of a source in a fixed order, and what the manifest says of it."""

    name: str
    """What --source was."""
    pairs: Sequence[Pair]
    split_rule: str
    licence: str
    """Licence and credit of the pictures, or "not stated"."""
    left_out: Counter[str]
    """Number of entries without a usable pair, by reason."""
    heldout_share: float = 0.0
    """What open_source was given; the embedded set has a rule of its own."""


def open_source(name: str, *, heldout_share: float = 0.02) -> Source:
    """List the pairs of a source without reading its pictures.

    Args:
        name: `openmoji`, or the path of a folder.
        heldout_share: share of a folder's pictures, by hash of the key, that training never sees.

    Raises:
        DataError: the folder is missing or holds no captioned picture.
    """
    if name == "openmoji":
        return _openmoji()
    folder = Path(name)
    if not folder.is_dir():
        raise DataError(f"--source {name} is neither `openmoji` nor a folder that exists.")
    metadata = next((folder / file for file in METADATA_NAMES if (folder / file).is_file()), None)
    source = (
        _image_folder(folder, metadata, heldout_share) if metadata else _text_folder(folder, heldout_share)
    )
    if not source.pairs:
        raise DataError(
            f"{folder} holds no captioned picture ({', '.join(IMAGE_SUFFIXES)} beside .txt, or metadata)."
        )
    return source


def read_picture(data: bytes) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes to RGB: EXIF rotation applied, transparency on white, first frame.

    Raises:
        ValueError: more than MAX_IMAGE_PIXELS pixels.
        OSError: another format, or broken bytes.
    """
    image: Image.Image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are over the limit of {MAX_IMAGE_PIXELS}")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _openmoji() -> Source:
    captions, left_out = openmoji.captioned_keys()
    pairs = [
        Pair(key=key, caption=caption, split=openmoji.split_of(key), open=partial(openmoji.render, key))
        for key, caption in captions.items()
    ]
    return Source("openmoji", pairs, openmoji.SPLIT_RULE, openmoji.LICENCE, left_out)


def _text_folder(folder: Path, heldout_share: float) -> Source:
    """Pair every picture below `folder` with the .txt file of the same stem beside it."""
    left_out: Counter[str] = Counter()
    pairs: list[Pair] = []
    for path in _pictures(folder):
        caption_file = path.with_suffix(".txt")
        if not caption_file.is_file():
            left_out["no .txt caption beside the picture"] += 1
            continue
        caption = caption_file.read_text(encoding="utf-8", errors="replace")
        _add(pairs, left_out, folder, path.relative_to(folder).as_posix(), caption, heldout_share)
    return Source(str(folder), pairs, _split_rule(heldout_share), "not stated", left_out, heldout_share)


def _image_folder(folder: Path, metadata: Path, heldout_share: float) -> Source:
    """Read Hugging Face's imagefolder: rows of file_name and text (or caption)."""
    from datasets import load_dataset

    kind = "json" if metadata.suffix == ".jsonl" else "csv"
    rows = load_dataset(kind, data_files=str(metadata), split="train")
    column = next((name for name in CAPTION_COLUMNS if name in rows.column_names), None)
    if column is None or "file_name" not in rows.column_names:
        wanted = f"file_name and one of {', '.join(CAPTION_COLUMNS)}"
        raise DataError(f"{metadata} has the columns {', '.join(rows.column_names)}; wanted are {wanted}.")
    left_out: Counter[str] = Counter()
    pairs: list[Pair] = []
    for row in rows:
        name = str(row["file_name"])
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
        if not inside or not (folder / name).is_file():
            left_out["metadata names a file that is not in the folder"] += 1
            continue
        _add(pairs, left_out, folder, name, str(row[column] or ""), heldout_share)
    pairs.sort(key=lambda pair: pair.key)
    return Source(str(folder), pairs, _split_rule(heldout_share), "not stated", left_out, heldout_share)


def _add(
    pairs: list[Pair], left_out: Counter[str], folder: Path, key: str, caption: str, heldout_share: float
) -> None:
    caption = " ".join(caption.split()).replace("\x00", "")
    if not caption:
        left_out["empty caption"] += 1
        return
    path = folder / key
    split = "heldout" if hash_uniform(key) < heldout_share else "train"
    pairs.append(Pair(key=key, caption=caption, split=split, open=lambda: read_picture(path.read_bytes())))


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )


def _split_rule(heldout_share: float) -> str:
    return f"sha256 of the key below {heldout_share} of its range is heldout"
