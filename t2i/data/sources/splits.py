"""Which pairs are held out: by a hash of the key, so that a pair keeps its split on every rank and in a grown source.

The share is the user's. Without one it is 2%, or in a small source as much as holds out 24 images: 2% of 60 would be
one, of which nothing can be measured.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from t2i.data.sources.source import Pair, Source, Tally, Unit
from t2i.files import hash_uniform

USUAL_SHARE = 0.02
LEAST_HELDOUT = 24
"""Held-out images of a small source. A score needs 20, and some may be broken."""
MOST_OF_SMALL = 0.4
"""With 50 images, 20 are held out."""
SMALL = round(LEAST_HELDOUT / USUAL_SHARE)
"""Images below which a source is small."""


def with_splits(source: Source, *, heldout_share: float) -> Source:
    """Decide the split of each pair that has none of the source's own."""
    return replace(source, units=partial(_decided_units, source, heldout_share), heldout_share=heldout_share)


def choose_share(source: Source) -> float:
    """Choose the share to hold out of a source whose pairs have no split yet."""
    places: dict[str, float] = {}
    for pair in _pairs(source):
        # An image that has a split of the source's own counts for neither side.
        if not pair.split:
            places.setdefault(pair.group or pair.key, _place(pair))
        if len(places) >= SMALL:
            return USUAL_SHARE
    num_heldout = min(LEAST_HELDOUT, int(MOST_OF_SMALL * len(places)))
    if not num_heldout:
        return 0.0 if places else USUAL_SHARE
    ordered = sorted(places.values())
    return max(USUAL_SHARE, _shortest_between(ordered[num_heldout - 1], ordered[num_heldout]))


def _place(pair: Pair) -> float:
    return hash_uniform(pair.group or pair.key)


def _pairs(source: Source) -> Iterator[Pair]:
    for unit in source.units(SMALL):
        yield from unit(Tally())


def _shortest_between(low: float, high: float) -> float:
    """Find a number over `low` and not over `high`, of few digits: a person may have to type it."""
    for digits in count(2):
        number = (int(low * 10**digits) + 1) / 10**digits
        if number <= high:
            return number
    raise AssertionError("two hashes are equal")


def _decided_units(source: Source, heldout_share: float, num_pairs: int) -> Sequence[Unit]:
    return [partial(_decided, unit, heldout_share) for unit in source.units(num_pairs)]


def _decided(unit: Unit, heldout_share: float, tally: Tally) -> Iterable[Pair]:
    for pair in unit(tally):
        is_heldout = _place(pair) < heldout_share
        yield pair if pair.split else replace(pair, split="heldout" if is_heldout else "train")
