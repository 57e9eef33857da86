"""Icon sets in Iconify's JSON form: what is kept and why not, captions, splits, wordings, and how icons are drawn."""

import json
from collections import Counter

import numpy as np
import pytest

from t2i.config import ASSETS, PrepareConfig, SourceConfig
from t2i.data.prepare.images import prepare
from t2i.data.shards.manifest import TRAIN, read_manifest
from t2i.data.shards.reader import check_shards, read_split
from t2i.data.sources import LeftOut, Tally, open_source, reopen_source
from t2i.data.sources.icon_drawing import Icon, draw_icon, open_icon
from t2i.data.sources.icon_sets import MAX_BODY, read_icon_set
from t2i.data.sources.icon_words import shares_word
from t2i.data.sources.iconify import read_icon_sets
from t2i.errors import DataError, UserError
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer

RED = '<rect width="16" height="16" fill="red"/>'
LEFT_HALF = '<rect width="8" height="16"/>'
NAMES = [f"thing-{number}" for number in range(60)]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def write_set(folder, prefix, icons, *, aliases=None, chars=None, info=None):
    bodies = {name: {"body": one} if isinstance(one, str) else one for name, one in icons.items()}
    write(folder / prefix / "icons.json", {"prefix": prefix, "icons": bodies, "aliases": aliases or {}})
    write(folder / prefix / "info.json", info or {"name": f"{prefix.title()} Emoji"})
    write(folder / prefix / "chars.json", chars or {})
    return folder / prefix / "icons.json"


def write_words(folder):
    """Write labels for three of the icons, in English and French, and a dictionary that knows an octopus twice."""
    emoji = [
        {"label": "octopus", "hexcode": "1F419", "tags": ["octopuses", "animal", "creature"], "group": 3},
        {"label": "dragon", "hexcode": "1F409", "tags": ["fairy tale"], "group": 3},
        {"label": "waving hand", "hexcode": "1F44B", "tags": ["bye", "hello"], "group": 1}
        | {"skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}]},
    ]
    french = {"1F419": "pieuvre", "1F409": "dragon", "1F44B": "signe de la main"}
    write(folder / "words" / "en" / "data.json", emoji)
    write(
        folder / "words" / "fr" / "data.json", [{"hexcode": key, "label": one} for key, one in french.items()]
    )
    write(
        folder / "words" / "package.json", {"name": "emojibase-data", "version": "17.0.0", "license": "MIT"}
    )
    lines = [
        "  1 a licence",
        '100 13 n 01 octopus 0 | arms of an octopus, as food; "eaten"',
        "200 05 n 01 octopus 0 | bottom-living cephalopod; a second",
    ]
    places = [len("\n".join(lines[:number]).encode()) + 1 for number in (1, 2)]
    write(folder / "dict" / "data.noun", "\n".join(lines) + "\n")
    index = f"  1 a licence\noctopus n 2 1 @ 2 0 {places[0]:08d} {places[1]:08d}  \n"
    write(folder / "dict" / "index.noun", index)


@pytest.fixture
def icons(tmp_path):
    """Three sets of the same things, of which two have a hand in a skin tone."""
    things = {name: RED for name in ("octopus", "dragon", *NAMES)}
    chars = {
        "1f419": "octopus",
        "1f409": "dragon",
        "1f44b": "waving-hand",
        "1f44b-1f3ff": "waving-hand-dark-skin-tone",
    }
    hands = {"waving-hand": RED, "waving-hand-dark-skin-tone": RED}
    write_set(
        tmp_path / "sets", "alpha", things | hands, chars=chars, aliases={"kraken": {"parent": "octopus"}}
    )
    write_set(tmp_path / "sets", "beta", things | {"kraken": RED} | hands)
    write_set(tmp_path / "sets", "gamma", things)
    write_words(tmp_path / "sets")
    return tmp_path / "sets"


def test_captions_are_labels_and_style(icons):
    captions = {pair.key: pair.caption for pair in open_source(f"iconify:{icons}").pairs}
    assert captions["alpha/octopus"] == "octopus, Alpha style"
    assert captions["beta/waving-hand-dark-skin-tone"] == "waving hand: dark skin tone, Beta style"
    assert captions["gamma/thing-7"] == "thing 7, Gamma style"


def test_a_concept_is_held_out_in_every_style_and_a_combination_never_in_all(icons):
    pairs = open_source(f"iconify:{icons}", heldout_share=0.3).pairs
    splits = {}
    for pair in pairs:
        if "#" not in pair.key:
            name = pair.key.partition("/")[2]
            concept = {"waving-hand-dark-skin-tone": "waving-hand", "kraken": "octopus"}.get(name, name)
            splits.setdefault(concept, []).append(pair.split)
    for found in splits.values():
        assert set(found) == {"heldout"} or ("heldout" not in found and "train" in found)
    number = Counter(split for found in splits.values() for split in set(found))
    assert 9 <= number["heldout"] <= 29 and 9 <= number["combinations"] <= 40
    assert {pair.split for pair in open_source(f"iconify:{icons}", heldout_share=0.0).pairs} == {TRAIN}


def test_wordings_avoid_the_words_of_the_label(icons):
    pairs = {pair.key: pair for pair in open_source(f"iconify:{icons}", heldout_share=0.999).pairs}
    said = {
        key.partition("#")[2]: one.caption for key, one in pairs.items() if key.startswith("alpha/octopus")
    }
    assert said == {
        "": "octopus, Alpha style",
        "tags": "animal, creature, Alpha style",
        # Of an animal, not of the dish that the dictionary has first; without the second sentence.
        "definition": "bottom-living cephalopod, Alpha style",
        "french": "pieuvre, Alpha style",
    }
    assert pairs["alpha/octopus#french"].split == "heldout-french"
    # One tag says too little, and the French for it is the same word.
    assert [key for key in pairs if key.startswith("alpha/dragon")] == ["alpha/dragon"]
    assert not any("tone#" in key for key in pairs)


@pytest.mark.parametrize(
    ("text", "label", "shares"),
    [
        ("an octopod", "octopus", False),
        ("octopuses of the sea", "octopus", True),
        ("signe de la main", "waving hand: dark skin tone", False),
        ("the one with a hat", "face with tears", False),
        ("chat", "cat", False),
        ("château", "chateau", True),
    ],
)
def test_words_are_compared_without_accents_and_endings(text, label, shares):
    assert shares_word(text, label) is shares


def test_every_entry_is_kept_left_out_or_broken(tmp_path):
    icons = {
        "good": RED,
        "kept-too": RED,
        "third": RED,
        "no-body": {"width": 4},
        "empty": "  ",
        "a-list": {"body": [RED]},
        "huge": "<!--" + "x" * MAX_BODY + "-->",
        "withdrawn": {"body": RED, "hidden": True},
        "reads-a-file": '<image href="/etc/passwd.png" width="16" height="16"/>',
        "reads-another": '<g xlink:href="other.svg#a"/>',
        "no-size": {"body": RED, "width": 0},
        "no-number": {"body": RED, "width": "wide"},
        "no-place": {"body": RED, "left": "here"},
        "by-class": "<style>.a { mask: url(#b) }</style>" + RED,
        "broken": "<rect",
        "white": '<rect width="16" height="16" fill="white"/>',
    }
    aliases = {
        "well": {"parent": "good"},
        "lost": {"parent": "nowhere"},
        "round": {"parent": "round"},
        "mirrored": {"parent": "well", "hFlip": True, "rotate": "90deg"},
        "odd": 3,
        "narrow": {"parent": "good", "width": -1},
    }
    write_set(tmp_path, "some", icons, aliases=aliases)
    source = open_source(f"iconify:{tmp_path}", heldout_share=0.0)
    assert {pair.key for pair in source.pairs} == {
        f"some/{name}" for name in ("good", "kept-too", "third", "broken", "white", "mirrored")
    }
    manifest = prepare(
        source,
        out=tmp_path / "shards",
        image_tokenizer=ImageTokenizer.load(ASSETS / "image_tokenizer"),
        text_tokenizer=TextTokenizer.load(ASSETS / "text_tokenizer"),
        config=PrepareConfig(max_broken=0.5),
    )
    assert (manifest.seen, manifest.broken, manifest.counts) == (len(icons) + len(aliases), 1, {"train": 4})
    assert manifest.left_out == {
        "an icon without a body": 3,
        f"an icon over {MAX_BODY:,} characters": 1,
        "an icon that its set has withdrawn (hidden)": 1,
        "an icon that holds or names other images, files or scripts": 2,
        "an icon without a size or a place": 4,
        "an icon whose style sheet refers to elements": 1,
        "an icon that draws nothing on white": 1,
        "another name of an icon (alias)": 1,
        "an alias of an icon that is not kept": 3,
    }


def pixels(icon, size=16):
    return np.asarray(draw_icon(icon, size=size)).mean(-1)


def test_icons_are_drawn_whole_turned_and_in_black_where_they_take_their_colour_from_around():
    half = pixels(Icon(LEFT_HALF))
    assert half[:, :7].max() == 0 and half[:, 9:].min() == 255
    assert np.array_equal(pixels(Icon(LEFT_HALF, is_flipped=True)), half[:, ::-1])
    assert np.array_equal(pixels(Icon(LEFT_HALF, quarter_turns=1)), np.rot90(half, -1))
    # A flip comes before a turn, as in Iconify: otherwise black would be below.
    assert pixels(Icon(LEFT_HALF, is_flipped=True, quarter_turns=1))[12:].max() == 0
    wide = pixels(Icon('<rect width="32" height="8" fill="currentColor"/>', width=32, height=8))
    assert wide[7:9].max() == 0 and wide[:5].min() == wide[11:].min() == 255
    with pytest.raises(LeftOut, match="draws nothing"):
        open_icon(Icon("<g/>"), size=16)


def test_icons_are_drawn_at_the_size_that_is_asked_for(tmp_path):
    write_set(tmp_path, "noto", {"a": RED, "b": RED})
    for asked, size in (({}, 256), ({"icon_size": 32}, 32)):
        source = open_source(f"iconify:{tmp_path}", config=SourceConfig(**asked))
        assert {pair.open().image.size for pair in source.pairs} == {(size, size)}


def chained(kind):
    """Three hundred elements, each of which is filled or cut by the next."""
    inner = '<rect width="9" height="9" {}="url(#a{})"/>'
    names = {"pattern": "fill", "clipPath": "clip-path"}
    links = [f'<{kind} id="a{n}">{inner.format(names[kind], n + 1)}</{kind}>' for n in range(300)]
    return "".join(links) + inner.format(names[kind], 0)


FILTER = '<filter id="f"><{}/></filter><rect width="16" height="16" filter="url(#f)"/>'


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<g>" * 20_000 + RED + "</g>" * 20_000, "more than 100 levels"),
        (chained("pattern"), "more than 100 levels"),
        (chained("clipPath"), "more than 100 levels"),
        (FILTER.format('feTurbulence baseFrequency="0.01" numOctaves="100000000"'), "numOctaves 100000000"),
        (FILTER.format('feMorphology radius="1 1e4"'), "radius 1 1e4; expected at most 0.8"),
        ('</g></svg><svg xmlns="http://www.w3.org/2000/svg"><g>', "no XML"),
        ("<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><text>&b;</text>", "no XML"),
    ],
    ids=["nested", "patterns", "clips", "noise", "thickening", "two roots", "entity"],
)
def test_a_strangers_icon_neither_ends_the_process_nor_takes_for_ever(body, said):
    """Without the checks the first three end this process by a signal."""
    with pytest.raises(ValueError, match=said):
        draw_icon(Icon(body), size=16)


def test_circles_of_references_and_far_places_are_drawn():
    circle = '<g id="a"><use href="#a"/></g>'
    assert pixels(Icon(circle + '<rect width="16" height="16"/>')).max() == 0
    far = Icon('<rect x="1234567.5" width="16" height="16"/>', left=1234567.5)
    assert pixels(far)[2:-2, 2:-2].max() == 0


def test_a_set_states_its_style_maker_and_licence(tmp_path):
    info = {"name": "Noto Emoji (v1)", "author": {"name": "Google"}, "license": {"title": "Apache 2.0"}}
    file = write_set(tmp_path, "noto-v1", {"a": RED}, info=info)
    write(file.with_name("package.json"), {"version": "1.2.5"})
    one = read_icon_set(file)
    assert (one.style, one.credit) == ("Noto v1", "Noto Emoji (v1) 1.2.5 by Google (Apache 2.0)")
    write(file.with_name("info.json"), {"author": "Google"})
    assert read_icon_set(file).credit == "noto-v1 1.2.5 by an unnamed maker (licence not stated)"


def test_icons_that_are_no_emoji_have_names_for_captions(tmp_path, caplog):
    # A font of icons numbers them privately: the number of one set says nothing of another's.
    for prefix, name in (("one", "abacus"), ("two", "bell-off")):
        write_set(tmp_path, prefix, {name: RED}, chars={"f01c9": name}, info={"name": f"{prefix} Icons"})
    pairs = open_source(f"iconify:{tmp_path}").pairs
    assert sorted(pair.caption for pair in pairs) == [
        "abacus, one Icons style",
        "bell off, two Icons style",
    ]
    assert "no emojibase-data" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "icons.json"),
        ('{"icons": {}}', "prefix"),
        ('{"prefix": "a", "icons": []}', "icons is"),
        ('{"prefix": "a", "icons": {"b": {}}}', "no icon that can be drawn: 1 times an icon without a body"),
        ('{"prefix": "a", "icons": {"b": {"body": "<g/>"}}, "aliases": 4}', "aliases is 4"),
        ('{"prefix": "a", "icons": {"b": {"body": "<g/>"}}, "info": [4]}', r"info is \[4\]"),
    ],
)
def test_a_file_that_is_no_icon_set_is_named(tmp_path, content, said):
    write(tmp_path / "icons.json", content)
    with pytest.raises(DataError, match=said) as raised:
        open_source(f"iconify:{tmp_path}")
    assert "icons.json" in str(raised.value)


def test_a_folder_without_sets_and_a_set_that_comes_twice_are_refused(tmp_path):
    with pytest.raises(DataError, match="make icons"):
        open_source(f"iconify:{tmp_path}")
    with pytest.raises(DataError, match="no existing file or folder"):
        open_source(f"iconify:{tmp_path}/{{a,b}}")
    with pytest.raises(UserError, match="without a folder"):
        open_source("iconify:")
    write_set(tmp_path / "old", "noto", {"a": RED})
    write_set(tmp_path / "new", "noto", {"a": RED})
    with pytest.raises(DataError, match="each set once"):
        open_source(f"iconify:{tmp_path}")
    assert open_source(f"iconify:{tmp_path}/n*").pairs
    # Of one style: a combination that is held out of one would be trained on in the other.
    write_set(tmp_path / "new", "noto-again", {"a": RED}, info={"name": "Noto"})
    with pytest.raises(DataError, match="both have the style Noto"):
        open_source(f"iconify:{tmp_path}/n*")


@pytest.mark.parametrize("name", ["words/en/data.json", "dict/index.noun"])
def test_words_that_are_not_as_their_makers_write_them_are_refused(icons, name):
    write(icons / name, "[1, 2]" if name.endswith("json") else "octopus n x\n")
    with pytest.raises(DataError, match="are not as|is not as"):
        open_source(f"iconify:{icons}")


@pytest.mark.parametrize("wrong", [{"hexcode": 9}, {"hexcode": "smile"}, {"tags": None}, {"label": ""}])
def test_emoji_that_are_not_as_their_makers_write_them_are_refused(icons, wrong):
    emoji = {"hexcode": "1F600", "label": "grinning face"} | wrong
    write(icons / "words" / "en" / "data.json", json.dumps([emoji]))
    with pytest.raises(DataError, match="is not as emojibase-data has it"):
        open_source(f"iconify:{icons}")


def test_shards_name_their_splits_and_what_has_other_wordings(icons, tmp_path, call, capsys):
    out = tmp_path / "shards"
    flags = ("--source", f"iconify:{icons}", "--heldout-share", 0.35, "--out", out, "--unit-pairs", 64)
    assert call("launchers/prepare.py", *flags) == 0
    assert "Alpha Emoji by an unnamed maker (licence not stated)" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["counts"])[:3] == ["train", "heldout", "combinations"]
    others = [split for split in manifest["counts"] if "-" in split]
    assert others and manifest["wordings"] == {split: split.partition("-")[0] for split in others}
    assert check_shards(out) == manifest["counts"]
    styles = {sample["key"]: sample["style"] for sample in read_split(out, "heldout")}
    assert styles and all(one.lower() == key.partition("/")[0] for key, one in styles.items())
    again = reopen_source(read_manifest(out))
    assert {pair.split for pair in again.pairs} == set(manifest["counts"])


def test_a_new_version_of_a_set_is_noticed(icons, tmp_path):
    before = list(open_source(f"iconify:{icons}").listing())
    file = icons / "beta" / "icons.json"
    write(file, file.read_text().replace("red", "blue"))
    after = list(open_source(f"iconify:{icons}").listing())
    assert [(one.name, one.text) for one in before] == [(one.name, one.text) for one in after]
    assert sum(one.file is not None for one in after) == 3  # of which size and time are compared


def test_a_tally_counts_what_was_listed(icons):
    tally, source = Tally(), open_source(f"iconify:{icons}")
    tally.add(source.tally)
    assert tally.seen == len(source.pairs) + tally.left_out.total()


def test_tones_are_known_from_names_alone(tmp_path):
    tones = ("light", "medium-light", "medium", "medium-dark", "dark")
    names = ["wave", *(f"wave-{tone}" for tone in tones), "police-car", "police-car-light", "dark-skin-tone"]
    write_set(tmp_path, "flat", dict.fromkeys(names, RED))
    words = read_icon_sets(str(tmp_path)).words
    assert words.concept_of("wave-medium-dark") == words.concept_of("wave") == "wave"
    assert words.label_of("wave-medium-dark") == "wave: medium-dark skin tone"
    assert words.concept_of("police-car-light") == "police-car-light"
    assert words.concept_of("dark-skin-tone") == "dark-skin-tone"
