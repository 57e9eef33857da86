"""What is shown of a source and of shards is what the model sees."""

import made_sources as made
import numpy as np
import pytest
import torch

from t2i.config import ASSETS, PrepareConfig, SourceConfig
from t2i.data.prepare.images import prepare
from t2i.data.prepare.preview import LookedAt, check_sheet, draw_sheet, preview, save_sheet, show_shards
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import check_image_tokenizer, check_shards, read_split
from t2i.data.sources import open_source
from t2i.errors import DataError, UserError
from t2i.tokens.image import ImageTokenizer, centre_crop_resize, images_of, to_pixels
from t2i.tokens.text import TextTokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "image_tokenizer": ImageTokenizer.load(ASSETS / "image_tokenizer"),
        "text_tokenizer": TextTokenizer.load(ASSETS / "text_tokenizer"),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(made.text_folder(tmp_path_factory.mktemp("source")), heldout_share=0.0)


def test_a_preview_shows_crops_decoded_codes_and_ids(source, tokenizers):
    rows = preview(source, num=3, config=PrepareConfig(unit_pairs=8), looked=LookedAt(), **tokenizers)
    assert [row.caption for row in rows] == [made.caption(index) for index in (0, 8, 16)]  # a unit each
    crops = [centre_crop_resize(made.picture(index), size=64) for index in (0, 8, 16)]
    codes = tokenizers["image_tokenizer"].encode(to_pixels(crops))
    decoded = images_of(tokenizers["image_tokenizer"].decode(codes)).numpy()
    for row, crop, back, codes_of_one in zip(rows, crops, decoded, codes.tolist(), strict=True):
        assert (np.asarray(row.images[0]) == np.asarray(crop)).all()
        assert (np.asarray(row.images[1]) == back).all()
        ids = tokenizers["text_tokenizer"].encode(row.caption).tolist()
        assert f"{len(ids)} ids: {' '.join(map(str, ids))}\n" in row.facts
        assert f"64 codes: {' '.join(map(str, codes_of_one[:12]))} ..." in row.facts
    assert draw_sheet(rows).size == (8 + 2 * 104 + 420, 8 + 3 * 104)
    with pytest.raises(DataError, match="no image of .* can be used"):
        filtered = open_source(source.name, config=SourceConfig(min_side=1_000))
        preview(filtered, num=3, config=PrepareConfig(), looked=LookedAt(), **tokenizers)


def test_a_sheet_replaces_a_sheet_and_nothing_else(source, tokenizers, tmp_path):
    rows = preview(source, num=1, config=PrepareConfig(), looked=LookedAt(), **tokenizers)
    sheet = tmp_path / "sheet.png"
    for _ in range(2):
        check_sheet(sheet)
        save_sheet(rows, sheet)
    made.picture(1).save(tmp_path / "mine.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name, sentence in (
        ("mine.png", "mine.png exists and is not a sheet of t2i"),
        ("broken.png", "broken.png exists and is not a sheet of t2i"),
        ("sheet.jpg", "expected a name that ends in .png"),
        ("gone/sheet.png", "there is no folder"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_sheet(tmp_path / name)


def test_shards_show_what_their_codes_and_ids_say(source, tokenizers, tmp_path):
    prepare(source, out=tmp_path / "shards", config=PrepareConfig(), **tokenizers)
    (tmp_path / "shards").rename(tmp_path / "moved")  # they carry their tokenizers
    rows = show_shards(tmp_path / "moved", num=6)
    samples = list(read_split(tmp_path / "moved", "train", num_samples=6))
    assert [row.caption for row in rows] == [sample["caption"] for sample in samples]
    codes = torch.tensor(np.stack([sample["codes"] for sample in samples]).astype(int))
    decoded = images_of(tokenizers["image_tokenizer"].decode(codes)).numpy()
    assert all((np.asarray(row.images[0]) == back).all() for row, back in zip(rows, decoded, strict=True))
    own = ImageTokenizer.load(tmp_path / "moved" / "image_tokenizer")
    check_image_tokenizer(tmp_path / "moved", own)


def test_a_bit_that_flipped_in_a_shard_is_found(source, tokenizers, tmp_path):
    out = tmp_path / "shards"
    prepare(source, out=out, config=PrepareConfig(unit_pairs=8), **tokenizers)
    assert check_shards(out) == {"train": made.NUM_IMAGES}
    file = next(out.rglob("unit_000001/*.mds"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"unit_000001/shard\.00000\.mds has xxh64 \w+; expected"):
        check_shards(out)


def test_lower_precision_is_measured_against_float32(source, tokenizers, tmp_path):
    lower = ImageTokenizer.load(ASSETS / "image_tokenizer", dtype=torch.bfloat16)
    settings = {"source": source, "config": PrepareConfig()}
    manifest = prepare(out=tmp_path / "b", **settings, **{**tokenizers, "image_tokenizer": lower})
    prepare(out=tmp_path / "f", **settings, **tokenizers)
    assert read_manifest(tmp_path / "f").codes_equal_float32 == 1.0
    codes = [np.stack([s["codes"] for s in read_split(tmp_path / name, "train")]) for name in "bf"]
    # All 24 pictures are in the sample, in one batch both times.
    assert manifest.codes_equal_float32 == pytest.approx((codes[0] == codes[1]).mean())
    assert 0.8 < manifest.codes_equal_float32 < 1
    check_image_tokenizer(tmp_path / "b", tokenizers["image_tokenizer"])
