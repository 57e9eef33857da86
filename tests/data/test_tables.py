"""Parquet files as people have them: failed downloads, paths and addresses in place of bytes, classes, chats."""

import json

import made_sources as made
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2i.data.sources import open_source
from t2i.data.sources.cell import FIRST_IMAGE
from t2i.errors import DataError

IMAGES = [made.encoded(index) for index in range(4)]


def write(path, captions=("a", "b", "c", "d"), images=IMAGES, **columns):
    pq.write_table(pa.table({"image": images, "text": captions, **columns}), path)
    return path


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([IMAGES[0], None, b"", IMAGES[3]], "a row without an image"),
        (
            [{"bytes": None, "path": "/etc/passwd"}] * 4,
            "a path in place of image bytes; write the bytes into",
        ),
        ([{"bytes": None, "path": "https://example.org/a.png"}] * 4, "an address in place of image bytes"),
        (["https://example.org/a.png"] * 4, "an address in place of image bytes; images are not downloaded"),
        (["a.png"] * 4, "a path in place of image bytes"),
        ([[1, 2]] * 4, "an image of type int, not bytes; --image-key names another column"),
        ([[]] * 4, "a row without an image"),
    ],
)
def test_cells_without_bytes_are_left_out_with_what_they_hold(images, reason, tmp_path):
    kept, tally = made.accounted(write(tmp_path / "a.parquet", images=images))
    assert [count for text, count in tally.left_out.items() if text.startswith(reason)] == [4 - len(kept)]
    assert len(kept) == (2 if isinstance(images[0], bytes) else 0)


def test_failed_downloads_say_their_status(tmp_path):
    status = ["success", "failed_to_download", "failed_to_resize", "success"]
    images = [IMAGES[0], None, None, IMAGES[3]]
    kept, tally = made.accounted(write(tmp_path / "a.parquet", images=images, status=status))
    assert tally.left_out == {
        "a row without an image (status failed_to_download)": 1,
        "a row without an image (status failed_to_resize)": 1,
    }
    assert len(kept) == 2


def test_of_several_images_of_a_row_the_first_is_used_and_counted(tmp_path):
    structs = [[{"bytes": one, "path": None}] * (1 + index % 2) for index, one in enumerate(IMAGES)]
    kept, tally = made.accounted(write(tmp_path / "a.parquet", images=structs))
    assert (len(kept), tally.changed) == (4, {FIRST_IMAGE: 2})


def test_numbers_of_classes_become_their_names(tmp_path):
    feature = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    facts = json.dumps({"info": {"features": {"label": feature}}})
    table = pa.table({"image": IMAGES, "label": [0, 1, -1, None]}).replace_schema_metadata(
        {"huggingface": facts}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"image, label; expected one of text, caption \(--caption-key\)"):
        open_source(str(tmp_path / "a.parquet")).units(8)
    kept, tally = made.accounted(tmp_path / "a.parquet", caption_key="label")
    assert (list(kept.values()), tally.left_out) == (["cat", "dog"], {"no caption": 2})
    # Without the names a number is no caption.
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "a.parquet")
    kept, tally = made.accounted(tmp_path / "a.parquet", caption_key="label")
    assert tally.left_out["a caption that is a number, not text; --caption-key names another"] == 3


def test_captions_that_are_not_text_are_left_out(tmp_path):
    chat = [[{"role": "user", "content": "a cat"}]] * 4
    for captions, reason in ((chat, "an object of keys"), ([float("nan"), 1.0, 2.0, None], "a number")):
        kept, tally = made.accounted(write(tmp_path / "a.parquet", captions=captions))
        assert not kept
        assert (
            sum(count for text, count in tally.left_out.items() if reason in text or text == "no caption")
            == 4
        )


def test_text_columns_of_every_kind_are_text(tmp_path):
    texts = pa.array(["a", "b", "ü", None])
    for column in (texts, texts.cast(pa.large_string()), texts.dictionary_encode(), texts.cast(pa.binary())):
        table = pa.table({"image": IMAGES, "text": column, "url": texts})
        pq.write_table(table, tmp_path / "a.parquet")
        kept, tally = made.accounted(tmp_path / "a.parquet", pair_key="url")
        assert (kept, tally.changed) == ({"a": "a", "b": "b", "ü": "ü"}, {})


def test_a_text_that_is_not_utf8_does_not_take_its_group(tmp_path):
    # As programs in C++ write them: the column says text, its bytes are another encoding.
    data = pa.array([b"a", b"caf\xe9", b"c", b"d"])
    broken = pa.StringArray.from_buffers(4, data.buffers()[1], data.buffers()[2])
    pq.write_table(pa.table({"image": IMAGES, "text": broken}), tmp_path / "a.parquet")
    kept, tally = made.accounted(tmp_path / "a.parquet")
    assert list(kept.values()) == ["a", "café", "c", "d"]
    assert tally.changed == {"a caption that is not UTF-8, read as cp1252": 1}


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays(
        [pa.array(IMAGES), pa.array(list("abcd")), pa.array(list("abcd"))], ["image", "text", "text"]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has 2 columns named text; expected one \(--caption-key\)"):
        open_source(str(tmp_path / "a.parquet")).units(8)


def test_a_file_without_rows_is_no_error_beside_others(tmp_path):
    write(tmp_path / "a.parquet")
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "b.parquet")
    assert len(made.accounted(tmp_path)[0]) == 4
