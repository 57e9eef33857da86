"""What a source is made of: entries as found, pairs as used, units of work."""

import io
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from t2i.config import SourceConfig
from t2i.errors import DataError
from t2i.files import hash_uniform, is_inside

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_IMAGE_PIXELS = 64_000_000
"""Larger pictures are refused as decompression bombs."""

UNREADABLE = (OSError, ValueError)
"""What reading a broken picture may raise."""
PILLOWS_OWN = (
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise beside UNREADABLE for some broken files: they have no common error."""

LISTED_UNIT = 512
"""Pairs read at a time where all of them are listed."""


class LeftOut(ValueError):
    """A picture that a filter refuses; the text is the reason."""


@dataclass(frozen=True)
class Pair:
    """One captioned picture, not yet read."""

    key: str
    """Unique within the source, stable over time."""
    caption: str
    split: str
    """train, heldout or combinations."""
    open: Callable[[], Image.Image] = field(compare=False)
    """Read the picture as RGB; raises LeftOut if a filter refuses it, one of UNREADABLE if it is broken."""
    group: str = ""
    """Pairs of one group show one picture; empty for a picture of its own."""
    codes: np.ndarray | None = field(default=None, compare=False)
    """(K,) codes, where the source has these and no picture."""


@dataclass(frozen=True)
class GivenIds:
    """What a source of ids says of them."""

    vocab_size: int
    length: int
    """Ids of each sequence."""
    made_by: str
    """What turned pictures into ids: shards and models of one name share their codes."""


Unit = Callable[[Counter[str]], Iterable[Pair]]
"""Reads a fixed run of pairs, which is prepared or done again as a whole; counts what is left out, by reason."""


@dataclass(frozen=True)
class Source:
    """A source's pairs in a fixed order, unit by unit, and what the manifest says of them."""

    units: Callable[[int], Sequence[Unit]]
    """Cut into units of about so many pairs; the same cut at every call and on every rank, without reading pairs."""
    name: str = ""
    """What --source was."""
    split_rule: str = ""
    licence: str = "not stated"
    """Licence and credit of the pictures."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of entries left out before the units, by reason."""
    heldout_share: float = 0.0
    """What open_source was given; the embedded set and COCO have rules of their own."""
    config: SourceConfig = field(default_factory=SourceConfig)
    given: GivenIds | None = None
    """What its pairs have in place of pictures; None for pictures."""

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every pair in order, the first of each key, listed at first use; pictures are read when they are opened."""
        found: dict[str, Pair] = {}
        for unit in self.units(LISTED_UNIT):
            for pair in unit(Counter()):
                found.setdefault(pair.key, pair)
        return list(found.values())


@dataclass(frozen=True)
class Entry:
    """What a source found, before any rule is applied."""

    key: str
    caption: object
    """Text, a list whose first text counts, or None."""
    open: Callable[[], Image.Image]
    facts: Mapping[str, object] = field(default_factory=dict)
    """The rest of its row: what pair_key and score_key choose from."""
    group: str = ""
    """Entries of one group show one picture and stay in one split; empty for each on its own."""
    split: str = ""
    """The source's own word on the split; empty for a hash."""


ReadEntries = Callable[[Counter[str]], Iterator[Entry]]
"""Reads a fixed run of entries; counts by reason what is none."""


def sift(
    left_out: Counter[str], *, read: ReadEntries, heldout_share: float, config: SourceConfig
) -> Iterator[Pair]:
    """Turn entries into pairs: captions in one line, splits by hash, filters; what is left out is counted."""
    for entry in read(left_out):
        caption = caption_text(entry.caption)
        reason = _reason(caption, entry.facts, config)
        if reason:
            left_out[reason] += 1
            continue
        key = encodable(str(entry.facts[config.pair_key]) if config.pair_key else entry.key)
        is_heldout = hash_uniform(entry.group or key) < heldout_share
        has_limits = config.min_side > 0 or config.max_aspect > 0
        yield Pair(
            key=key,
            caption=caption,
            split=entry.split or ("heldout" if is_heldout else "train"),
            open=partial(open_within, entry.open, config=config) if has_limits else entry.open,
            group=entry.group,
        )


def caption_text(value: object) -> str:
    """Write a caption in one line: of a list the first, of nothing the empty text."""
    first = (value[0] if value else "") if isinstance(value, list | tuple) else value
    return " ".join(encodable(str(first or "")).replace("\x00", "").split())


def encodable(text: str) -> str:
    """Write out what UTF-8 cannot hold: half a pair of JSON's \\u escapes, or bytes of a file name in another code."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def open_within(read: Callable[[], Image.Image], *, config: SourceConfig) -> Image.Image:
    """Read a picture and refuse it if a side or the aspect is outside the limits.

    Raises:
        LeftOut: it is.
    """
    image = read()
    short, long = sorted(image.size)
    if short < config.min_side:
        raise LeftOut(f"a side below {config.min_side} pixels")
    if config.max_aspect and long > config.max_aspect * short:
        raise LeftOut(f"longer than {config.max_aspect:g} times its other side")
    return image


def file_inside(folder: Path, name: str) -> Path | None:
    """Find a file by the name that a list gives it; None if there is none, or it lies outside the folder."""
    try:
        return folder / name if is_inside(name) and (folder / name).is_file() else None
    except (OSError, ValueError):  # a name that is too long, or none for this file system
        return None


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a broken file into a sentence.

    Raises:
        DataError: the file is no parquet, or broken.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:  # of which one is for text that is not UTF-8
        raise DataError(f"{path} is no parquet file, or broken: {error}.") from error


def read_image_file(path: Path) -> Image.Image:
    """Read a picture file as RGB."""
    return read_picture(path.read_bytes())


def read_picture(data: bytes) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes to RGB: EXIF rotation applied, transparency on white, first frame.

    Raises:
        ValueError: more than MAX_IMAGE_PIXELS pixels, or broken bytes.
        OSError: another format, or broken bytes.
    """
    try:
        return _decode(data)
    except UnidentifiedImageError as error:  # whose own text holds an address in memory
        raise UnidentifiedImageError("cannot identify JPEG, PNG or WebP") from error
    except PILLOWS_OWN as error:
        raise ValueError(f"a broken picture ({type(error).__name__}: {error})") from error


def _decode(data: bytes) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are over the limit of {MAX_IMAGE_PIXELS}")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _reason(caption: str, facts: Mapping[str, object], config: SourceConfig) -> str:
    """Say why an entry is left out; empty if it is not."""
    if not caption:
        return "empty caption"
    if len(caption) < config.min_caption:
        return f"a caption below {config.min_caption} characters"
    if config.max_caption and len(caption) > config.max_caption:
        return f"a caption over {config.max_caption} characters"
    if config.pair_key and facts.get(config.pair_key) is None:
        return f"no {config.pair_key}"
    if config.score_key:
        score = facts.get(config.score_key)
        if not isinstance(score, int | float):
            return f"no number in {config.score_key}"
        if config.min_score is not None and not score >= config.min_score:
            return f"{config.score_key} below {config.min_score:g}"
    return ""
