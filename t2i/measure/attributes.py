"""What a caption of the embedded images says for certain: kind, colour, skin tone, flag, count.

Only what a caption states is an attribute. A red apple has a colour, an apple has none, though apples are drawn red.
"""

import re
from collections.abc import Mapping

Attributes = Mapping[str, str]
"""Attribute -> value, for the attributes that a caption states."""

NAMES = ("kind", "colour", "tone", "flag", "count")

TONE = re.compile(r"(medium-light|medium-dark|light|medium|dark) skin tone")
WORD = re.compile(r"[a-z’-]+")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
NO_TONE = "none"
"""A person without a skin tone in the caption is drawn yellow."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALONE = _words(
    "man woman person boy girl child prince princess merman mermaid merperson claus ninja detective guard singer"
    " scientist teacher cook farmer judge pilot astronaut firefighter mechanic artist student technologist fairy"
    " vampire mage elf superhero supervillain worker officer snowboarder dancer"
)
TOGETHER = _words("couple kiss men women people family")
HANDS = _words("hand hands fist finger fingers thumbs palms backhand handshake salute")
MEMBERS = _words("man woman boy girl adult child")
"""Whom the caption of a family lists."""
SEVERAL, ONE, HAND, FLAG = "people", "person", "hand", "flag"


def attributes_of(caption: str) -> Attributes:
    """Read the attributes that a caption states."""
    text = caption.lower()
    words = WORD.findall(TONE.sub("", text))
    kind = _kind(text, words)
    found: dict[str, str] = {} if kind is None else {"kind": kind}
    if kind == FLAG:
        found["flag"] = "yes"
    if kind in (ONE, SEVERAL, HAND):
        tones = set(TONE.findall(text))
        if len(tones) <= 1:  # of two people in two tones, a caption does not say who stands where
            found["tone"] = next(iter(tones), NO_TONE)
    elif kind != FLAG:
        colours = [colour for colour in COLOURS if colour in words]
        if len(colours) == 1:
            found["colour"] = colours[0]
    if count := _count(kind, words):
        found["count"] = count
    return found


def _kind(text: str, words: list[str]) -> str | None:
    said = set(words)
    if text.startswith("flag:"):
        return FLAG
    if text.startswith("keycap"):
        return "keycap"
    if text.startswith("regional indicator"):
        return "letter"
    if "o’clock" in said or (words and words[-1].endswith("-thirty")):
        return "clock"
    for kind, names in ((SEVERAL, TOGETHER), (ONE, ALONE), (HAND, HANDS)):
        if said & names:
            return kind
    return next((kind for kind in ("button", "arrow", "face", "square", "circle") if kind in said), None)


def _count(kind: str | None, words: list[str]) -> str | None:
    """Count the people that a caption states."""
    if "baby" in words:
        return None  # whether it is counted depends on who reads the caption
    if kind == ONE:
        return "1"
    if kind != SEVERAL:
        return None
    if "family" not in words:
        return "2"  # a couple, a kiss, two who hold hands, wrestle or dance: emoji show two
    members = sum(word in MEMBERS for word in words)
    return str(members) if members else None
