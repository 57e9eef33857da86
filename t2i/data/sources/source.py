"""The parts of a source: entries as they are found, pairs as they are used, and units of work."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np

from t2i.config import SourceConfig
from t2i.data.sources.caption import CaptionLine, LeftOut, encodable, read_captions
from t2i.data.sources.image import OpenedImage

LISTED_UNIT = 512
"""Pairs per unit when all pairs are listed."""


@dataclass(frozen=True)
class Pair:
    """One captioned image, not decoded yet."""

    key: str
    """Unique within the source and stable over time."""
    caption: str
    split: str
    """train, or the name of a held-out split; empty while the share that is held out is not decided."""
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
    style: str = ""
    """How the image is drawn, which its caption names; empty for a source that does not tell. A shuffled caption is of
    the same style, so that it differs in what is drawn alone."""


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


def first_of_each_image(pairs: Iterable[Pair]) -> list[Pair]:
    """Keep the first pair of each image: one of several captions has a pair for each."""
    firsts: dict[str, Pair] = {}
    for pair in pairs:
        firsts.setdefault(pair.group or pair.key, pair)
    return list(firsts.values())


KeyForm = Literal["bare", "shard", "row"]
"""How keys of tables and datasets are made. row: as now; shard: of the shard's number in a dataset that save_to_disk
wrote, which changes with the number of rows; bare: as shard, with a column `key` as the whole key, as in 0.1."""

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
    wordings: Mapping[str, str] = field(default_factory=dict)
    """Splits whose images are those of another split, under captions in other words: their names -> that split."""
    given: GivenIds | None = None
    """Describes precomputed tokens; None for a source of images."""
    listing: Callable[[], Iterable[Listed]] = tuple
    """List what the source consists of, in order, so that a change of it is noticed."""
    num_pairs: int | None = None
    """Pairs of all units; None if they are only known once they are read."""
    is_streamed: bool = False
    """Pairs hold their images' bytes, and cannot be listed without them."""

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
    """What read_captions takes."""
    open: Callable[[], OpenedImage]
    facts: Mapping[str, object] = field(default_factory=dict)
    """The other columns of the row, which pair_key and score_key choose from."""
    group: str = ""
    """Entries of one group show the same image and stay in one split; empty if the image has one caption."""
    split: str = ""
    """The split that the source itself gives; empty to choose by a hash."""
    file: Path | None = None
    """The file that holds this image alone."""
    style: str = ""
    """As in Pair."""


ReadEntries = Callable[[Tally], Iterator[Entry]]
"""Reads a fixed run of entries, and counts what is left out."""


def sift(tally: Tally, *, read: ReadEntries, config: SourceConfig) -> Iterator[Pair]:
    """Turn entries into pairs: clean the captions, apply the filters; count what is left out."""
    for entry in read(tally):
        try:
            captions = read_captions(
                entry.caption, takes_all=config.captions == "all", encoding=config.caption_encoding
            )
        except LeftOut as reason:
            tally.left_out[str(reason)] += 1
            continue
        # With all captions each is an entry; the reader counted one.
        tally.seen += len(captions) - 1
        for number, caption in enumerate(captions):
            refusal = _reason(caption.text, entry.facts, config)
            if refusal:
                tally.left_out[refusal] += 1
            else:
                yield _pair(entry, caption, number, config)


def _pair(entry: Entry, caption: CaptionLine, number: int, config: SourceConfig) -> Pair:
    key = key_text(entry.facts[config.pair_key] if config.pair_key else entry.key)
    return Pair(
        # The first has the key that it would have alone.
        key=f"{key}#{number}" if number else key,
        caption=caption.text,
        split=entry.split,
        open=partial(open_within, entry.open, config=config),
        group=entry.group or (key if config.captions == "all" else ""),
        changed=caption.changed,
        file=entry.file,
        style=entry.style,
    )


def key_text(value: object) -> str:
    """Return a key as text that UTF-8 can hold."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else encodable(str(value))


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


def _reason(caption: str, facts: Mapping[str, object], config: SourceConfig) -> str:
    """Return the reason that an entry is left out; empty if it is kept."""
    if len(caption) < config.min_caption:
        return f"a caption below {config.min_caption} characters"
    if config.max_caption and len(caption) > config.max_caption:
        return f"a caption over {config.max_caption} characters"
    if config.pair_key and facts.get(config.pair_key) is None:
        return f"no {config.pair_key}"
    if config.score_key:
        score = _number(facts.get(config.score_key))
        if score is None:
            return f"no number in {config.score_key}"
        if config.min_score is not None and not score >= config.min_score:
            return f"{config.score_key} below {config.min_score:g}"
    return ""


def _number(value: object) -> float | None:
    """Read a number, which a table of separated values has as text; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | bytes | Decimal):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
