"""What becomes a caption and what does not, alike in every kind of source."""

import json

import made_sources as made
import pytest

from t2i.config import SourceConfig
from t2i.data.sources.caption import FIRST_CAPTION, JOINED_LINES, LeftOut, TextFile, read_captions
from t2i.data.sources.caption_list import read_caption_list
from t2i.errors import DataError, UserError
from t2i.files import lines_of

GUESSED = "a caption that is not UTF-8, read as cp1252"
ENCODED = {
    "UTF-8": ("café 😀".encode(), "café 😀", None),
    "marked UTF-8": ("café".encode("utf-8-sig"), "café", None),
    "UTF-16": ("café 猫".encode("utf-16"), "café 猫", None),
    "big-endian UTF-16": (b"\xfe\xff" + "café".encode("utf-16-be"), "café", None),
    "Windows": (b"caf\xe9 \x96 caf\xe9", "café – café", GUESSED),
}


def read(value, *, takes_all=False, encoding="cp1252"):
    return [
        (line.text, line.changed) for line in read_captions(value, takes_all=takes_all, encoding=encoding)
    ]


@pytest.mark.parametrize("kind", ENCODED)
def test_encodings_are_told_by_their_mark_or_guessed_aloud(kind):
    data, text, changed = ENCODED[kind]
    expected = [(text, (changed,) if changed else ())]
    assert read(data) == read(TextFile(data)) == read([data]) == expected


def test_a_guess_can_be_set_and_what_does_not_fit_is_left_out():
    data = "红苹果".encode("gbk")
    assert read(data, encoding="gbk") == [("红苹果", ("a caption that is not UTF-8, read as gbk",))]
    with pytest.raises(LeftOut, match="neither UTF-8 nor cp1252 .--caption-encoding names another"):
        read(b"\x81\x8d")
    with pytest.raises(LeftOut, match="bytes that are not text"):
        read(made.encoded(0))
    with pytest.raises(UserError, match="--caption-encoding is 'klingon'; expected one that Python knows"):
        SourceConfig(caption_encoding="klingon")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "^no caption$"),
        (float("nan"), "^no caption$"),
        ([], "^no caption$"),
        ([None, " \n"], "^no caption$"),
        ("\0 \ufeff", "^no caption$"),
        (1.0, "a caption that is a number, not text; --caption-key names another"),
        (7, "a number"),
        (True, "true or false"),
        ({"en": "a cat"}, "an object of keys"),
        ([{"role": "user", "content": "a cat"}], "a list with an object of keys in it"),
        (["a cat", 7], "a list with a number in it"),
        ([["a cat"]], "a list with of type list in it|a list with .* in it"),
    ],
)
def test_what_is_not_text_is_left_out_with_its_type(value, reason):
    with pytest.raises(LeftOut, match=reason):
        read(value)


def test_of_several_captions_the_first_or_all_are_taken():
    assert read(["", "one ", None, "two"]) == [("one", (FIRST_CAPTION,))]
    assert read(["", "one ", None, "two"], takes_all=True) == [("one", ()), ("two", ())]
    lines = TextFile(b"one\r\ntwo\n\n caf\xe9\n")
    assert read(lines) == [("one two café", (GUESSED, JOINED_LINES))]
    assert read(lines, takes_all=True) == [("one", ()), ("two", ()), ("café", (GUESSED,))]
    # A caption in a table may have lines: they are one caption with either setting.
    assert read("one\ntwo", takes_all=True) == [("one two", (JOINED_LINES,))]


def test_only_line_ends_end_lines():
    assert lines_of("a\u2028b\x0cc\x85d\r\ne\rf\n") == ["a\u2028b\x0cc\x85d", "e", "f"]


def test_one_caption_in_another_encoding_is_the_same_from_every_source(tmp_path):
    data, text, guess = ENCODED["Windows"]
    image = made.encoded(0)
    for name in ("folder", "csv", "jsonl", "parquet"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(image)
    (tmp_path / "folder" / "a.txt").write_bytes(data)
    (tmp_path / "csv" / "metadata.csv").write_bytes(b"file_name,text\na.png," + data)
    (tmp_path / "jsonl" / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "' + data + b'"}')
    made.write_table(tmp_path / "parquet" / "metadata.parquet", [{"file_name": "a.png", "text": data}])
    made.write_table(tmp_path / "bytes.parquet", [{"image": image, "text": data}])
    made.write_tar(tmp_path / "text.tar", [("a.png", image), ("a.txt", data)])
    made.write_tar(tmp_path / "json.tar", [("a.png", image), ("a.json", b'{"caption": "' + data + b'"}')])
    for source in (*map(str, tmp_path.iterdir()),):
        kept, tally = made.accounted(source)
        assert (list(kept.values()), tally.changed) == ([text], {guess: 1}), source


def test_tables_are_read_by_their_byte_order_mark(tmp_path):
    (tmp_path / "a.png").write_bytes(made.encoded(0))
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,café\n", encoding=encoding)
        assert made.accounted(tmp_path)[0] == {"a.png": "café"}
    (tmp_path / "metadata.csv").unlink()
    row = json.dumps({"file_name": "a.png", "text": "café"}, ensure_ascii=False)
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "metadata.jsonl").write_text(row, encoding=encoding)
        assert made.accounted(tmp_path)[0] == {"a.png": "café"}


def test_each_of_several_captions_is_a_pair_in_one_split(tmp_path):
    rows = [{"image": made.encoded(i), "text": [f"one {i}", "", f"two {i}"]} for i in range(20)]
    made.write_table(tmp_path / "a.parquet", rows)
    name = str(tmp_path / "a.parquet")
    first, tally = made.accounted(name)
    assert list(first.values()) == [f"one {i}" for i in range(20)]
    assert tally.changed == {FIRST_CAPTION: 20}
    both, tally = made.accounted(name, captions="all")
    assert (tally.seen, tally.changed) == (40, {})
    # The first caption keeps the key that it has alone.
    assert {key: text for key, text in both.items() if "#" not in key} == first
    from t2i.data.sources import open_source

    pairs = open_source(name, heldout_share=0.5, config=SourceConfig(captions="all")).pairs
    splits = {pair.group: {other.split for other in pairs if other.group == pair.group} for pair in pairs}
    assert len(splits) == 20 and all(len(found) == 1 for found in splits.values())
    assert {"train", "heldout"} == set.union(*splits.values())


def test_every_caption_of_rows_and_of_lists_within_them_is_a_pair(tmp_path):
    made.write_images(tmp_path)
    rows = [{"file_name": "000.png", "text": text} for text in (["x", "y"], ["z", "w"], "v")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept, _ = made.accounted(tmp_path, captions="all")
    assert kept["000.png"] == "x" and sorted(kept.values()) == ["v", "w", "x", "y", "z"]


def test_a_caption_list_names_the_empty_cell_and_forgives_blank_lines_above_its_header(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("\n\nid,caption\n1,a cat\n2,a dog\n")
    assert [row.text for row in read_caption_list(table)] == ["a cat", "a dog"]
    table.write_text("id,caption\n1,a cat\n2,\n")
    with pytest.raises(DataError, match="the caption of row 2 is empty; expected a caption"):
        read_caption_list(table)
    tabs = table.with_suffix(".tsv")
    tabs.write_text('\nid\tcaption\n1\t"a" cat, "5"\n')
    assert [row.text for row in read_caption_list(tabs)] == ['"a" cat, "5"']
