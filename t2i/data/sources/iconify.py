"""Icon sets as a source: captions of label and style, split by what is shown and by how, and held-out wordings.

A caption is "octopus, Noto style". Training never sees `heldout`: a tenth of all concepts, in every style and skin
tone. Of every other concept it never sees a few styles, `combinations`: both are known, but not together. Images of
both come again under captions in other words, each in a split of its own: `combinations-french` has "pieuvre, Noto
style".
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from t2i.data.sources.icon_drawing import open_icon
from t2i.data.sources.icon_sets import ICONS, IconSet, read_icon_set
from t2i.data.sources.icon_words import WORDINGS, Words, read_words
from t2i.data.sources.image import OpenedImage
from t2i.data.sources.pattern import expand_any
from t2i.data.sources.source import Entry, Tally
from t2i.errors import DataError, UserError
from t2i.files import hash_uniform

logger = logging.getLogger(__name__)

HELDOUT_SHARE = 0.1
"""Share of concepts that training never sees, and of the other concepts' styles."""

HELDOUT, COMBINATIONS = "heldout", "combinations"
WORDING_SPLITS = {f"{split}-{wording}": split for split in (HELDOUT, COMBINATIONS) for wording in WORDINGS}
"""Split of a wording -> the split whose images it has."""

SPLIT_RULE = (
    "sha256 of the concept (its code points without skin tones, else its name) below {share} of its range is heldout in"
    " every style; of the other concepts' styles, all but one of each, sha256 of concept and style below {share} is"
    " combinations"
)


@dataclass(frozen=True)
class IconSets:
    """All that a source of icons is read from."""

    sets: list[IconSet]
    words: Words
    licence: str
    """Makers and licences of all sets and words."""


def read_icon_sets(pattern: str) -> IconSets:
    """Read every icon set below the folders that a pattern names, and the words beside them.

    Raises:
        DataError: there is none, or two are the same set.
        UserError: the pattern is empty.
    """
    if not pattern:
        raise UserError(
            "--source is iconify: without a folder; expected one with icon sets, such as data/icons."
        )
    places = expand_any(pattern)
    files = [file for place in places for file in _set_files(place)]
    if not files:
        raise DataError(
            f"--source iconify:{pattern} has no {ICONS} in it or below: expected packages @iconify-json/NAME, unpacked."
            " `make icons` fetches seven emoji sets to data/icons."
        )
    sets = [read_icon_set(file) for file in dict.fromkeys(files)]
    for index, one in enumerate(sets):
        same = next((other for other in sets[:index] if other.prefix == one.prefix), None)
        if same:
            raise DataError(f"{one.file} is the set {one.prefix}, as is {same.file}; expected each set once.")
        # Captions tell sets by their styles alone, and so what a combination is of.
        same = next((other for other in sets[:index] if other.style == one.style), None)
        if same:
            raise DataError(
                f"{one.file} and {same.file} both have the style {one.style}; expected one of each."
            )
    words, credits = read_words(
        [place for place in places if place.is_dir()],
        names=chain.from_iterable(one.icons for one in sets),
        code_points=[one.code_points for one in sets],
        aliases=[one.aliases for one in sets],
    )
    if not words.emoji:
        logger.warning(
            "iconify:%s has no emojibase-data: captions are the icons' names, and no image has other wordings.",
            pattern,
        )
    return IconSets(sets, words, licence="; ".join([*(one.credit for one in sets), *credits]))


def list_icons(tally: Tally, *, icons: IconSets, heldout_share: float, size: int) -> Iterator[Entry]:
    """List the icons of all sets, each held-out one also under its other wordings, to be drawn at a size in pixels."""
    words = icons.words
    styles: dict[str, list[str]] = {}
    for one in icons.sets:
        tally.left_out.update(one.left_out)
        tally.seen += one.left_out.total()
        for concept in dict.fromkeys(map(words.concept_of, one.icons)):
            styles.setdefault(concept, []).append(one.prefix)
    for one in icons.sets:
        for name, icon in one.icons.items():
            concept = words.concept_of(name)
            split = split_of(concept, one.prefix, styles=styles[concept], share=heldout_share)
            entries = _entries(one, name, partial(open_icon, icon, size=size), words=words, split=split)
            tally.seen += len(entries)
            yield from entries


def split_of(concept: str, style: str, *, styles: Iterable[str], share: float) -> str:
    """Choose the split of a concept in one style by hashes; see SPLIT_RULE."""
    if hash_uniform("concept", concept) < share:
        return HELDOUT
    places = {one: hash_uniform("style", concept, one) for one in styles}
    # One style stays, or the concept would not be known.
    is_kept = places[style] == max(places.values())
    return COMBINATIONS if places[style] < share and not is_kept else "train"


def _entries(
    one: IconSet, name: str, draw: Callable[[], OpenedImage], *, words: Words, split: str
) -> list[Entry]:
    """List one icon: under its label, and a held-out one under each wording of it."""
    key = f"{one.prefix}/{name}"
    said = {"": words.label_of(name)}
    if split != "train":
        said |= words.wordings_of(name)
    return [
        Entry(
            f"{key}#{wording}" if wording else key,
            f"{text}, {one.style} style",
            draw,
            group=key,
            split=f"{split}-{wording}" if wording else split,
            style=one.style,
        )
        for wording, text in said.items()
    ]


def _set_files(place: Path) -> Iterable[Path]:
    return sorted(place.rglob(ICONS)) if place.is_dir() else [place]
