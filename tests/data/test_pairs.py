import json
from collections import Counter

import pytest
from PIL import Image

from t2i.data import sources as pairs
from t2i.data.sources import openmoji
from t2i.errors import DataError


def picture(path, colour="red", mode="RGB"):
    Image.new(mode, (12, 8), colour).save(path)


@pytest.mark.parametrize(
    ("key", "caption"),
    [
        ("1F9D7-1F3FD-200D-2640-FE0F", "woman climbing: medium skin tone"),
        ("1F468-1F3FC-200D-1F9B1", "man: medium-light skin tone, curly hair"),
        (
            "1F469-1F3FF-200D-1F91D-200D-1F469-1F3FC",
            "women holding hands: dark skin tone, medium-light skin tone",
        ),
        ("1F1E9-1F1EA", "flag: Germany"),
        ("1F3FB", "light skin tone"),
        ("23FE", "power sleep symbol"),
        ("E000", None),
        ("1F3F4-E0075-E0073-E0063-E0061-E007F", None),
    ],
)
def test_emoji_captions(key, caption):
    assert openmoji.caption_of(key) == caption


def test_the_embedded_set_is_split_by_base_image():
    source = pairs.open_source("openmoji")
    counts = Counter(pair.split for pair in source.pairs)
    assert 3_800 < len(source.pairs) < 4_300
    assert 0.07 < counts["heldout"] / len(source.pairs) < 0.13
    heldout_bases = {openmoji.base_of(pair.key) for pair in source.pairs if pair.split == "heldout"}
    seen_bases = {openmoji.base_of(pair.key) for pair in source.pairs if pair.split != "heldout"}
    assert not heldout_bases & seen_bases


def test_combinations_are_toned_variants_of_seen_images():
    source = pairs.open_source("openmoji")
    trained = {openmoji.base_of(pair.key) for pair in source.pairs if pair.split == "train"}
    combinations = [pair for pair in source.pairs if pair.split == "combinations"]
    assert combinations
    assert all("skin tone" in pair.caption for pair in combinations)
    assert all(openmoji.base_of(pair.key) in trained for pair in combinations)


def test_emoji_are_drawn_on_white():
    image = openmoji.render("1F600")
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((64, 64), "RGB", (255, 255, 255))


def test_a_folder_with_captions_beside_images(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    picture(tmp_path / "c.jpg")
    (tmp_path / "a.txt").write_text("  a red\n square ")
    (tmp_path / "b.txt").write_text(" \n")
    source = pairs.open_source(str(tmp_path))
    assert [(pair.key, pair.caption) for pair in source.pairs] == [("a.png", "a red square")]
    assert sorted(source.tally.left_out.values()) == [1, 1]
    assert source.pairs[0].open().image.size == (12, 8)


def test_an_imagefolder_with_metadata(tmp_path):
    picture(tmp_path / "b.png", "blue")
    picture(tmp_path / "a.png")
    rows = [("b.png", "blue"), ("a.png", "red"), ("gone.png", "gone"), ("../x.png", "outside")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = pairs.open_source(str(tmp_path))
    assert [(pair.key, pair.caption) for pair in source.pairs] == [("a.png", "red"), ("b.png", "blue")]
    assert sum(source.tally.left_out.values()) == 2


def test_metadata_without_captions_names_the_columns(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 1}')
    with pytest.raises(DataError, match=r"file_name, label; expected one of text, caption \(--caption-key\)"):
        pairs.open_source(str(tmp_path))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere is not `openmoji`"):
        pairs.open_source(str(tmp_path / "nowhere"))
