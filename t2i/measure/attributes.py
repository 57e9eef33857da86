"""What a caption of the embedded images says for certain: kind, colour, skin tone, flag, count.

Only what a caption states is an attribute. A red apple has a colour, an apple has none, though apples are drawn red.
What a caption leaves open, or names in passing, is left unstated: an envelope with arrow is no arrow.
"""

import re
from collections.abc import Mapping, Sequence

Attributes = Mapping[str, str]
"""Attribute -> value, for the attributes that a caption states."""

NAMES = ("kind", "colour", "tone", "flag", "count")

TONE = re.compile(r"(medium-light|medium-dark|light|medium|dark) skin tone")
WORD = re.compile(r"[a-z0-9’'-]+")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
UNSURE = "white"
"""In the names of Unicode's symbols it means outlined: a white flower is drawn in red lines."""
HAIR = "hair"
"""Its colours are no paints: red hair is orange."""
NO_TONE = "none"
"""A person without a skin tone in the caption is drawn yellow."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MEMBERS = _words("man woman person boy girl child adult")
"""Who is a person, whatever follows: a woman cook, a man dancing, and in a family, in a couple."""
ROLES = _words(
    "prince princess mermaid merman merperson claus ninja detective guard singer scientist teacher cook farmer judge"
    " pilot astronaut firefighter mechanic artist student technologist fairy vampire mage elf superhero supervillain"
    " worker officer snowboarder skier dancer"
)
"""Who is a person where the caption ends with the word: an artist, and no artist palette."""
PLURALS = _words("men women people")
GROUPS = _words("couple kiss family")
HANDS = _words("hand hands fist finger fingers handshake salute")
PARTS_OF_HANDS = _words("thumbs palms backhand")
"""Of a hand where the caption begins with the word: thumbs up."""
SKINLESS = _words("genie zombie")
"""Persons whose skin has a colour of its own."""
SEVERAL, ONE, HAND, FLAG = "people", "person", "hand", "flag"


def attributes_of(caption: str) -> Attributes:
    """Read the attributes that a caption states."""
    text = caption.lower()
    tones = TONE.findall(text)
    if ", " in text and not tones:
        return {}  # a list of names says what is joined, not what the image shows
    words = WORD.findall(TONE.sub("", text))
    kind = _kind(text, words)
    stated = {
        "kind": kind,
        "colour": _colour(words) if kind not in (ONE, SEVERAL, HAND, FLAG) else None,
        "tone": _tone(set(tones), kind, words),
        "flag": "yes" if kind == FLAG else None,
        "count": _count(kind, words),
    }
    return {name: value for name, value in stated.items() if value is not None}


def _kind(text: str, words: Sequence[str]) -> str | None:
    if text.startswith(("keycap ", "regional indicator ")):
        return "keycap" if text.startswith("keycap") else "letter"
    head = _head(words)
    if text.startswith("flag:") or (head and head[-1] in ("flag", "flags")):
        return FLAG
    if not head:
        return None
    if "o’clock" in head or head[-1].endswith("-thirty"):
        return "clock"
    if head[0] in PLURALS or _is_group(head) or _are_two(words):
        return SEVERAL
    if head[0] in MEMBERS or head[-1] in ROLES | MEMBERS | SKINLESS:
        return ONE
    if "face" in head:
        return "face"
    if head[-1] in HANDS or head[0] in PARTS_OF_HANDS:
        return HAND
    return next((kind for kind in ("button", "arrow", "square", "circle") if kind in head), None)


def _head(words: Sequence[str]) -> list[str]:
    """Take the words that name the thing: before what it is with."""
    places = [place for place, word in enumerate(words) if word in ("with", "and")]
    return list(words[: min(places, default=len(words))])


def _is_group(head: Sequence[str]) -> bool:
    """Tell a kiss, or a kiss of woman and man, from a kiss mark."""
    return head[0] in GROUPS and all(word in MEMBERS for word in head[1:])


def _are_two(words: Sequence[str]) -> bool:
    return len(words) > 2 and words[0] in MEMBERS and words[1] == "and" and words[2] in MEMBERS


def _colour(words: Sequence[str]) -> str | None:
    """Read the one colour, of something: the half black and a leafy green are not of anything."""
    colours = [word for word in words if word in COLOURS]
    is_sure = len(set(colours)) == 1 and colours[0] != UNSURE and words[-1] not in (colours[0], HAIR)
    return colours[0] if is_sure else None


def _tone(tones: set[str], kind: str | None, words: Sequence[str]) -> str | None:
    if tones:  # of two people in two tones, a caption does not say who stands where
        return next(iter(tones)) if len(tones) == 1 else None
    has_skin = kind in (ONE, SEVERAL, HAND) and not SKINLESS.intersection(words)
    return NO_TONE if has_skin else None


def _count(kind: str | None, words: Sequence[str]) -> str | None:
    """Count the people that a caption states."""
    if "baby" in words:
        return None  # whether it is counted depends on who reads the caption
    if kind == ONE:
        return "1"
    if kind != SEVERAL:
        return None
    if words[0] != "family":
        return "2"  # a couple, a kiss, two who hold hands, wrestle or dance: emoji show two
    members = len(words) - 1
    return str(members) if members else None
