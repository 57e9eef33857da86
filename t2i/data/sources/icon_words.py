"""What an icon shows, in words: CLDR labels, and wordings of them that training does not have.

Labels, tags and labels in French come from a folder of the package emojibase-data, definitions from one with WordNet's
`index.noun` and `data.noun`. Both are optional: without them an icon's name is its label, and there are no wordings.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i.errors import DataError
from t2i.files import parse_json, read_optional_json

WORDINGS = ("tags", "definition", "french")
"""Names of the wordings, which end the names of their splits."""

MOST_TAGS, LEAST_TAGS = 5, 2

TONES = {0x1F3FB, 0x1F3FC, 0x1F3FD, 0x1F3FE, 0x1F3FF}
VARIATION_SELECTOR = 0xFE0F
TONE_NAMES = "medium-light|medium-dark|light|medium|dark"
LONG_TONES = re.compile(rf"(?:-(?:{TONE_NAMES})-skin-tone)+$")
SHORT_TONES = re.compile(rf"(?:-(?:{TONE_NAMES}))+$")

COMMON = frozenset({"and", "for", "from", "not", "off", "out", "over", "the", "with"})
"""Words of labels that say nothing alone."""

KINDS_OF_GROUPS = {3: (5, 20, 17, 19), 4: (13, 20), 1: (18, 8), 6: (4, 6)}
"""Which of WordNet's topics suit an emoji's group: animals and nature, food, people, activities. The first octopus of
the dictionary is a dish."""
OTHER_KINDS = (6, 15, 17, 14)


@dataclass(frozen=True)
class Emoji:
    """What CLDR says of one emoji."""

    label: str
    tags: tuple[str, ...] = ()
    french: str = ""
    group: int = -1


@dataclass(frozen=True)
class Words:
    """Names, and what they stand for."""

    codes: dict[str, str] = field(default_factory=dict)
    """Icon name -> code points without U+FE0F, such as "1F419"."""
    emoji: dict[str, Emoji] = field(default_factory=dict)
    """By code points."""
    definitions: dict[str, dict[int, str]] = field(default_factory=dict)
    """Label -> WordNet's topic -> definition, the most frequent first."""
    names: frozenset[str] = frozenset()
    """Of all icons."""

    def emoji_of(self, name: str) -> Emoji | None:
        """Find what CLDR says of an icon by its name; None if it is not known."""
        return self.emoji.get(self.codes.get(spelled(name), ""))

    def label_of(self, name: str) -> str:
        """Return CLDR's label of an icon, else the words of its name."""
        if found := self.emoji_of(name):
            return found.label
        base = self.untoned(name)
        tones = [f"{tone} skin tone" for tone in re.findall(TONE_NAMES, name[len(base) :])]
        return f"{self.label_of(base)}: {', '.join(tones)}" if tones else name.replace("-", " ")

    def concept_of(self, name: str) -> str:
        """Return what an icon shows, alike in all sets and skin tones: code points, else the name without tones."""
        base = self.untoned(name)
        return self.codes.get(spelled(base), spelled(base))

    def untoned(self, name: str) -> str:
        """Return an icon's name without skin tones; the name itself if it has none."""
        long = LONG_TONES.sub("", name)
        if long != name and (long in self.names or spelled(long) in self.codes):
            return long
        # "police car light" has no tone: an emoji that has one has them all.
        short = SHORT_TONES.sub("", name)
        return short if f"{short}-medium-dark" in self.names else name

    def wordings_of(self, name: str) -> dict[str, str]:
        """Say what an icon shows without the words of its label, in each of WORDINGS that there is one in."""
        found = self.emoji_of(name)
        if found is None or self.untoned(name) != name:
            return {}
        tags = [tag for tag in found.tags if not shares_word(tag, found.label)]
        said = {
            "tags": ", ".join(tags[:MOST_TAGS]) if len(tags) >= LEAST_TAGS else "",
            "definition": self._definition(found),
            "french": found.french,
        }
        return {key: text for key, text in said.items() if text and not shares_word(text, found.label)}

    def _definition(self, emoji: Emoji) -> str:
        senses = self.definitions.get(emoji.label, {})
        kinds = KINDS_OF_GROUPS.get(emoji.group, OTHER_KINDS)
        return next((senses[kind] for kind in kinds if kind in senses), "")


def spelled(name: str) -> str:
    """Spell a name as most sets do: one of them has "flag-for-france", the others "flag-france"."""
    return name.replace("flag-for-", "flag-").replace("flag-flag-", "flag-")


def read_words(
    folders: list[Path],
    *,
    names: Iterable[str],
    code_points: Iterable[Mapping[str, str]],
    aliases: Iterable[Mapping[str, str]],
) -> tuple[Words, list[str]]:
    """Read the words that lie below the folders; also return which of the two sources of words there are.

    Args:
        names: of all icons.
        code_points: per set, name -> code points.
        aliases: per set, other name -> name.

    Raises:
        DataError: a file of words is not as its makers write it.
    """
    labels, dictionary = (_first(folders, name) for name in ("en/data.json", "index.noun"))
    emoji = _emoji(labels.parent.parent) if labels else {}
    codes = {slug(one.label): code for code, one in emoji.items()}
    for stated in code_points:
        codes |= {spelled(name): plain(points) for name, points in stated.items()}
    for others in aliases:
        for other, name in others.items():
            if spelled(name) in codes:
                codes.setdefault(spelled(other), codes[spelled(name)])
    definitions = _definitions(dictionary, {one.label for one in emoji.values()}) if dictionary else {}
    credits = [_credit_of_labels(labels.parent.parent)] if labels else []
    return Words(codes, emoji, definitions, frozenset(names)), [
        *credits,
        *(["definitions: WordNet"] if definitions else []),
    ]


def plain(points: str) -> str:
    """Write code points without U+FE0F, which some sets leave out."""
    return "-".join(point for point in points.upper().split("-") if int(point, 16) != VARIATION_SELECTOR)


def slug(label: str) -> str:
    """Spell a label as icon sets name their icons: "woman: dark skin tone" -> "woman-dark-skin-tone"."""
    return "-".join(_words(label.replace("'", "").replace("\u2019", "")))


def shares_word(text: str, label: str) -> bool:
    """Tell whether a text has a word of a label, or one that begins like it."""
    ours = [word for word in _words(label) if len(word) > 2 and word not in COMMON]
    theirs = [word for word in _words(text) if len(word) > 2]
    return any(one.startswith(other) or other.startswith(one) for one in ours for other in theirs)


def _words(text: str) -> list[str]:
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.findall(r"[a-z0-9]+", letters.replace("&", " and "))


def _first(folders: list[Path], name: str) -> Path | None:
    return next((path for folder in folders if folder.is_dir() for path in sorted(folder.rglob(name))), None)


def _emoji(folder: Path) -> dict[str, Emoji]:
    french = {plain(one["hexcode"]): str(one["label"]) for one in _listed(folder / "fr" / "data.json")}
    found: dict[str, Emoji] = {}
    for one in _listed(folder / "en" / "data.json"):
        code, tags, group = plain(one["hexcode"]), one.get("tags", []), one.get("group", -1)
        found[code] = Emoji(str(one["label"]), tuple(map(str, tags)), french.get(code, ""), group)
    return found


def _listed(file: Path) -> list[dict[str, Any]]:
    """List the emoji of one language, each with its skin tones after it; none without the file."""
    if not file.is_file():
        return []
    # The one list among the project's JSON files, which are objects.
    values = parse_json(b'{"all": ' + file.read_bytes() + b"}", where=file)["all"]
    try:
        listed = [one for base in values for one in (base, *base.get("skins", []))]
        if all(
            one["label"] and plain(one["hexcode"]) and isinstance(one.get("tags", []), list) for one in listed
        ):
            return listed
    except (TypeError, AttributeError, KeyError, ValueError):
        pass
    raise DataError(
        f"{file} is not as emojibase-data has it: expected a list of emoji with hexcode, label and perhaps tags."
    )


def _credit_of_labels(folder: Path) -> str:
    package = read_optional_json(folder / "package.json")
    version = f" {package['version']}" if "version" in package else ""
    return f"labels: emojibase-data{version} ({package.get('license') or 'licence not stated'})"


def _definitions(index: Path, labels: set[str]) -> dict[str, dict[int, str]]:
    """Look labels up in WordNet's nouns, the most frequent sense of each topic first."""
    wanted = {label.lower().replace(" ", "_"): label for label in labels}
    found: dict[str, dict[int, str]] = {}
    try:
        with index.open() as lines, index.with_name("data.noun").open("rb") as data:
            for line in lines:
                lemma, *rest = line.split()
                if lemma not in wanted or line.startswith(" "):
                    continue
                senses = found.setdefault(wanted[lemma], {})
                # The offsets are the last ones, as many as the second field says.
                for offset in rest[-int(rest[1]) :]:
                    data.seek(int(offset))
                    head, _, gloss = data.readline().decode().partition("|")
                    # What follows a semicolon are examples, or a second definition.
                    senses.setdefault(int(head.split()[1]), gloss.split(";")[0].strip())
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{index} and data.noun are not as WordNet has them: {error}.") from error
    return found
