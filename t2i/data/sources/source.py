"""The parts of a source: entries as they are found, pairs as they are used, and units of work."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from t2i.config import SourceConfig
from t2i.data.sources.image import OpenedImage
from t2i.errors import DataError
from t2i.files import is_inside

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

LISTED_UNIT = 512
"""Pairs per unit when all pairs are listed."""


class LeftOut(ValueError):
    """An image was refused by a filter; the text is the reason."""


@dataclass(frozen=True)
class Pair:
    """One captioned image, not decoded yet."""

    key: str
    """Unique within the source and stable over time."""
    caption: str
    split: str
    """train, heldout or combinations; empty while the share that is held out is not decided."""
    open: Callable[[], OpenedImage] = field(compare=False)
    """Decode the image; raises LeftOut if a filter refuses it, one of UNREADABLE if it is broken."""
    group: str = ""
    """Pairs of one group show the same image; empty if the image has one caption."""
    changed: tuple[str, ...] = ()
    """What was lost or guessed when the caption was read, for Tally.changed once the pair is kept."""
    codes: np.ndarray | None = field(default=None, compare=False)
    """(K,) precomputed codes; None for an image."""
    file: Path | None = field(default=None, compare=False)
    """The file that holds this image alone; None for one of a tar or table, or drawn."""


@dataclass(frozen=True)
class GivenIds:
    """What ids.json says about a source of precomputed tokens."""

    vocab_size: int
    length: int
    """Ids per sequence."""
    made_by: str
    """Name of what made the ids; shards and models with the same name share their codes."""


@dataclass
class Tally:
    """What the entries of a source came to, counted while they are read."""

    seen: int = 0
    """Entries of the source, each counted where it is listed, before anything is decided about it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Entries that became no pair, by reason."""
    changed: Counter[str] = field(default_factory=Counter)
    """Entries that were kept otherwise than they are in the source, by what was changed."""
    unread: Counter[str] = field(default_factory=Counter)
    """Files that were not read, or not to their end, by reason; what they hold is in no other count."""

    def add(self, other: "Tally") -> None:
        """Add the counts of another part of the source."""
        self.seen += other.seen
        for mine, theirs in (
            (self.left_out, other.left_out),
            (self.changed, other.changed),
            (self.unread, other.unread),
        ):
            mine.update(theirs)


@dataclass(frozen=True)
class Listed:
    """One thing that is known of a source before its units are read: a pair, or a file of many."""

    name: str
    text: str = ""
    """What is read of it, beside the file."""
    file: Path | None = None


Unit = Callable[[Tally], Iterable[Pair]]
"""Reads a fixed run of pairs, which is prepared as a whole, and counts what its entries came to."""


@dataclass(frozen=True)
class Source:
    """A source's pairs in a fixed order, unit by unit, and what the manifest records about them."""

    units: Callable[[int], Sequence[Unit]]
    """Split the source into units of about so many pairs, alike at every call and on every rank; reads no pair."""
    name: str = ""
    """The value of --source."""
    split_rule: str = ""
    licence: str = "not stated"
    """Licence of the images and credit for them."""
    tally: Tally = field(default_factory=Tally)
    """What was counted before the units were made."""
    heldout_share: float = 0.0
    """The argument of open_source; the embedded dataset and COCO have their own split rules."""
    config: SourceConfig = field(default_factory=SourceConfig)
    given: GivenIds | None = None
    """Describes precomputed tokens; None for a source of images."""
    listing: Callable[[], Iterable[Listed]] = tuple
    """List what the source consists of, in order, so that a change of it is noticed."""
    num_pairs: int | None = None
    """Pairs of all units; None if they are only known once they are read."""
    is_streamed: bool = False
    """Reading further costs a download."""

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every pair in order, the first of each key; listed at first use, with no image decoded."""
        found: dict[str, Pair] = {}
        for unit in self.units(LISTED_UNIT):
            for pair in unit(Tally()):
                found.setdefault(pair.key, pair)
        return list(found.values())


@dataclass(frozen=True)
class Entry:
    """One row of a source, before any filter is applied."""

    key: str
    caption: object
    """A text, a list of texts of which the first is taken, or None."""
    open: Callable[[], OpenedImage]
    facts: Mapping[str, object] = field(default_factory=dict)
    """The other columns of the row, which pair_key and score_key choose from."""
    group: str = ""
    """Entries of one group show the same image and stay in one split; empty if the image has one caption."""
    split: str = ""
    """The split that the source itself gives; empty to choose by a hash."""
    file: Path | None = None
    """The file that holds this image alone."""


ReadEntries = Callable[[Tally], Iterator[Entry]]
"""Reads a fixed run of entries, and counts what is left out."""


def sift(tally: Tally, *, read: ReadEntries, config: SourceConfig) -> Iterator[Pair]:
    """Turn entries into pairs: clean the caption, apply the filters; count what is left out."""
    for entry in read(tally):
        caption = caption_text(entry.caption)
        reason = _reason(caption, entry.facts, config)
        if reason:
            tally.left_out[reason] += 1
            continue
        key = encodable(str(entry.facts[config.pair_key]) if config.pair_key else entry.key)
        has_limits = config.min_side > 0 or config.max_aspect > 0
        yield Pair(
            key=key,
            caption=caption,
            split=entry.split,
            open=partial(open_within, entry.open, config=config) if has_limits else entry.open,
            group=entry.group,
            file=entry.file,
        )


def caption_text(value: object) -> str:
    """Return a caption as one line: the first of a list, the empty text for None."""
    first = (value[0] if value else "") if isinstance(value, list | tuple) else value
    return " ".join(encodable(str(first or "")).replace("\x00", "").split())


def encodable(text: str) -> str:
    """Escape what UTF-8 cannot hold, such as half of a surrogate pair, or a file name in another encoding."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def open_within(read: Callable[[], OpenedImage], *, config: SourceConfig) -> OpenedImage:
    """Decode an image and check its sides and its aspect ratio.

    Raises:
        LeftOut: one of them is outside the limits.
    """
    opened = read()
    short, long = sorted(opened.image.size)
    if short < config.min_side:
        raise LeftOut(f"a side below {config.min_side} pixels")
    if config.max_aspect and long > config.max_aspect * short:
        raise LeftOut(f"longer than {config.max_aspect:g} times its other side")
    return opened


def file_inside(folder: Path, name: str) -> Path | None:
    """Find a file by the name that a list gives it; None if it does not exist or lies outside the folder."""
    try:
        return folder / name if is_inside(name) and (folder / name).is_file() else None
    except (OSError, ValueError):
        # The file system refuses the name, for example because it is too long.
        return None


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors into a DataError.

    Raises:
        DataError: the file is not parquet, or is broken.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise DataError(f"{path} is not a parquet file, or is broken: {error}.") from error


def _reason(caption: str, facts: Mapping[str, object], config: SourceConfig) -> str:
    """Return the reason that an entry is left out; empty if it is kept."""
    if not caption:
        return "no caption"
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
