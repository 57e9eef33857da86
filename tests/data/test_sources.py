"""Every kind of source: listed, prepared to the same codes, trained on; and what is left out, with the reason."""

import json
from dataclasses import replace
from pathlib import Path

import made_sources as made
import pytest

from t2i.config import ASSETS, DataConfig, ModelConfig, PrepareConfig, RunConfig, SourceConfig, TrainConfig
from t2i.data.loader import StepLoader
from t2i.data.prepare.images import prepare
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import read_split
from t2i.data.sources import Tally, open_source, reopen_source
from t2i.errors import DataError, UserError
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.image import ImageTokenizer, centre_crop_resize, to_pixels
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train.main import train

ROOT = Path(__file__).parents[2]
CONFIG = PrepareConfig(unit_pairs=8, batch_size=8)


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "image_tokenizer": ImageTokenizer.load(ASSETS / "image_tokenizer"),
        "text_tokenizer": TextTokenizer.load(ASSETS / "text_tokenizer"),
    }


@pytest.fixture(scope="module")
def wanted(tokenizers):
    """The codes of every picture, by caption, without any source."""
    images = [centre_crop_resize(made.picture(index), size=64) for index in range(made.NUM_IMAGES)]
    codes = tokenizers["image_tokenizer"].encode(to_pixels(images)).tolist()
    return {made.caption(index): row for index, row in enumerate(codes)}


def samples(shards):
    return [sample for split in read_manifest(shards).counts for sample in read_split(shards, split)]


def run_config(shards, run_dir):
    return RunConfig(
        run_dir=run_dir,
        data=DataConfig(shards=shards, seq_len=90),
        model=ModelConfig(hidden_size=16, num_layers=1, num_heads=2),
        train=TrainConfig(max_steps=2, global_batch_tokens=4 * 90, eval_every=2, eval_images=2),
    )


def step_loader(config, tokenizer):
    manifest = read_manifest(config.data.shards)
    return StepLoader(
        config.data,
        layout=VocabLayout(tokenizer.num_tokens, tokenizer.num_tokens, manifest.codebook_size),
        global_batch=4,
        world_size=1,
        seed=0,
        tokenizer=tokenizer,
    )


TRAINED = ("text_folder", "hub_tars")
"""Training reads shards, whose form no source changes: one source here and one of the hub stand for all."""


@pytest.mark.parametrize("kind", made.KINDS)
def test_each_source_gives_the_same_pairs_and_codes_and_trains(kind, tmp_path, tokenizers, wanted):
    name = made.KINDS[kind](tmp_path / "source")
    source = open_source(name, heldout_share=0.2)
    out = tmp_path / "shards"
    manifest = prepare(source, out=out, config=CONFIG, **tokenizers)
    assert sum(manifest.counts.values()) == made.NUM_IMAGES
    # Batches differ from those of `wanted`; one code in a hundred may tie otherwise.
    for sample in samples(out):
        codes = zip(sample["codes"].tolist(), wanted[sample["caption"]], strict=True)
        assert sum(a == b for a, b in codes) >= 0.99 * 64
    again = {pair.key: pair for pair in reopen_source(manifest).pairs}
    assert {sample["key"] for sample in samples(out)} == set(again)
    assert all(pair.open().image.size == (90, 60) for pair in again.values())
    config = run_config(out, tmp_path / "run")
    if kind not in TRAINED:
        batch = next(iter(step_loader(config, tokenizers["text_tokenizer"])))
        assert batch["input_ids"].shape == (4, 90) and set(batch["key"]) <= set(again)
        return
    train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    assert [row["step"] for row in read_metrics(config.run_dir) if "split" not in row] == [1, 2]


def left_out_of(source):
    """Read a source whole; count what was left out, and the keys kept."""
    tally = Tally()
    tally.add(source.tally)
    keys = [pair.key for unit in source.units(8) for pair in unit(tally)]
    return tally.left_out + tally.unread, keys


def test_unfinished_and_broken_tars_are_reported_and_the_rest_is_used(tmp_path, caplog):
    folder = made.tars(tmp_path / "some")
    made.write_tar(folder / "00002.tar", made.tar_members(range(3)))
    source = open_source(str(folder))
    left_out, keys = left_out_of(source)
    assert left_out == {"an unfinished tar (no _stats.json)": 1}
    assert "00002.tar has no 00002_stats.json" in caplog.text
    assert keys[0] == "some/00000/000000000"
    assert len(keys) == made.NUM_IMAGES
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2])
    left_out, keys = left_out_of(open_source(str(folder)))
    assert left_out["a broken tar, from where it breaks"] == 1
    assert made.NUM_IMAGES // 2 < len(keys) < made.NUM_IMAGES


def test_img2datasets_plain_files_are_read_although_their_tables_lie_beside_them(tmp_path):
    made.text_folder(tmp_path / "cc3m" / "00000")
    made.write_table(tmp_path / "cc3m" / "00000.parquet", [{"url": "http://x", "caption": "x"}])
    (tmp_path / "cc3m" / "00000_stats.json").write_text("{}")
    pairs = open_source(str(tmp_path / "cc3m")).pairs
    assert [(pair.key, pair.caption) for pair in pairs[:2]] == [
        ("00000/000.png", made.caption(0)),
        ("00000/001.png", made.caption(1)),
    ]


def test_a_value_with_an_unquoted_comma_is_refused_by_its_line(tmp_path):
    made.metadata_csv(tmp_path)
    table = tmp_path / "metadata.csv"
    table.write_text(table.read_text().replace(made.caption(1), "a dog, a cat"))
    with pytest.raises(
        DataError, match=r"metadata\.csv: line 3 has 3 values for the 2 columns file_name, text"
    ):
        open_source(str(tmp_path))


def test_odd_members_of_a_tar_are_passed_over(tmp_path):
    import tarfile

    path = tmp_path / "odd.tar"
    made.write_tar(path, [("a.txt", b"no picture"), ("b.png", made.encoded(1)), ("c.png", made.encoded(2))])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with_text = tmp_path / "two" / "x.tar"
    made.write_tar(
        with_text,
        [("../../up.png", made.encoded(3)), ("../../up.txt", b"up"), ("e.jpg", b"\0"), ("e.json", b"{")],
    )
    left_out, keys = left_out_of(open_source(f"{tmp_path}/{{odd,two/x}}.tar"))
    assert left_out == {
        "no image beside the caption in a tar": 1,
        "no caption": 2,
        "a .json that cannot be read in a tar": 1,
        "a link or device in a tar": 1,
    }
    assert keys == ["two/x/../../up"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["odd.tar", "two", "x.tar"]


def test_captions_and_names_come_from_the_keys_that_are_asked_for(tmp_path):
    folder = made.tars(tmp_path / "some")
    source = open_source(str(folder), config=SourceConfig(caption_key="caption", pair_key="similarity"))
    assert [(pair.key, pair.caption) for pair in source.pairs[:2]] == [
        ("0.0", "json says 0"),
        (str(1 / 24), "json says 1"),
    ]
    name = made.parquet_bytes(tmp_path / "table")
    with pytest.raises(DataError, match=r"file_name, text; expected one of title \(--caption-key\)"):
        open_source(name, config=SourceConfig(caption_key="title")).units(8)
    for key in ("pair", "score"):
        with pytest.raises(DataError, match=rf"expected one of similarty \(--{key}-key\)"):
            open_source(name, config=SourceConfig(**{f"{key}_key": "similarty"})).units(8)


def test_filters_are_counted_in_the_manifest_by_reason(tmp_path, tokenizers):
    folder = tmp_path / "some"
    members = [*made.tar_members(range(12))]
    for key, text in (("long", b"x" * 300), ("short", b"x")):
        members += [(f"{key}.png", made.encoded(1)), (f"{key}.txt", text), (f"{key}.json", b"{}")]
    for key, size in (("wide", (99, 32)), ("small", (40, 31))):
        buffer = made.io.BytesIO()
        made.picture(0).resize(size).save(buffer, "PNG")
        facts = b'{"similarity": 1.0}'
        members += [(f"{key}.png", buffer.getvalue()), (f"{key}.txt", b"a caption"), (f"{key}.json", facts)]
    members += [("bad.png", b"no picture"), ("bad.txt", b"a caption"), ("bad.json", b'{"similarity": 1}')]
    members += [("none.png", made.encoded(2)), ("none.txt", b"a caption"), ("none.json", b"{}")]
    made.write_tar(folder / "0.tar", members)
    reading = SourceConfig(
        min_side=32, max_aspect=3.0, min_caption=2, max_caption=200, score_key="similarity", min_score=0.25
    )
    source = open_source(f"{folder}/0.tar", config=reading)
    config = replace(CONFIG, max_broken=0.2)
    manifest = prepare(source, out=tmp_path / "shards", config=config, **tokenizers)
    assert manifest.left_out == {
        "a caption below 2 characters": 1,
        "a caption over 200 characters": 1,
        "a side below 32 pixels": 1,
        "longer than 3 times its other side": 1,
        "no number in similarity": 1,
        "similarity below 0.25": 6,
    }
    assert manifest.broken == 1
    assert sum(manifest.counts.values()) == 6
    assert reopen_source(manifest).config == reading
    with pytest.raises(UserError, match="--min-score is 0.5, but --score-key names no column"):
        open_source("openmoji", config=SourceConfig(min_score=0.5))


@pytest.mark.parametrize("views", [1, 3])
def test_of_a_key_in_several_units_the_first_is_kept(tmp_path, tokenizers, views):
    folder = tmp_path / "table"
    content = made.rows(image="image")
    content = [{**row, "url": f"u{index % 20}"} for index, row in enumerate(content)]
    made.write_table(folder / "a.parquet", content)
    source = open_source(str(folder), heldout_share=0.3, config=SourceConfig(pair_key="url"))
    config = replace(CONFIG, unit_pairs=5, views=views)
    manifest = prepare(source, out=tmp_path / "shards", config=config, **tokenizers)
    assert manifest.left_out == {"a key that was there before": 4}
    kept = {sample["key"]: sample["caption"] for sample in samples(tmp_path / "shards")}
    pictures = {key: text for key, text in kept.items() if "@" not in key}
    assert pictures == {f"u{index}": made.caption(index) for index in range(20)}
    assert len(kept) == manifest.counts["train"] + manifest.counts["heldout"]
    assert manifest.counts["train"] == sum(split == "train" for split in splits(source)) * views
    assert not list((tmp_path / "shards").rglob("units"))


def splits(source):
    first = {pair.key: pair.split for pair in reversed(source.pairs)}
    return first.values()


def test_annotations_of_another_schema_are_a_sentence(tmp_path):
    made.coco(tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "captions_train2014.json"
    file.write_text(json.dumps({"images": [{"id": 1}], "annotations": []}))
    with pytest.raises(DataError, match=r"captions_train2014\.json: images: file_name is None; expected str"):
        open_source(f"coco:{tmp_path}/coco")


def test_val_captions_of_coco_are_held_out_and_an_image_never_in_both(tmp_path):
    source = open_source(made.coco(tmp_path / "coco"))
    assert {pair.split for pair in source.pairs if int(pair.key[:12]) >= 20} == {"heldout"}
    assert {pair.split for pair in source.pairs if int(pair.key[:12]) < 20} == {"train"}
    assert source.split_rule == "images of captions_val*.json are heldout, all others train"
    file = tmp_path / "coco" / "annotations" / "captions_train2014.json"
    content = json.loads(file.read_text())
    content["annotations"] += [{**note, "id": 5000 + note["id"]} for note in content["annotations"]]
    file.write_text(json.dumps(content))
    (tmp_path / "coco" / "annotations" / "captions_val2014.json").unlink()
    (tmp_path / "coco" / "train2014" / "COCO_train2014_000000000003.jpg").unlink()
    source = open_source(f"coco:{tmp_path}/coco", heldout_share=0.5)
    assert source.tally.left_out == {"annotations name an image that is not in its folder": 2}
    assert len(source.pairs) == 2 * 19
    by_image = {}
    for pair in source.pairs:
        by_image.setdefault(pair.key[:12], set()).add(pair.split)
    assert all(len(found) == 1 for found in by_image.values())
    assert set.union(*by_image.values()) == {"train", "heldout"}


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has no annotations/captions_\*\.json"):
        open_source(f"coco:{tmp_path}")
    with pytest.raises(DataError, match=r"nobody/nothing is not `openmoji`.*\(hf:USER/NAME\)"):
        open_source("nobody/nothing")
    with pytest.raises(DataError, match="the Hugging Face dataset nobody/nothing cannot be opened"):
        open_source("hf:nobody/nothing")
    (tmp_path / "x.zip").touch()
    with pytest.raises(DataError, match=r"files with \.zip; expected only \.tar or only \.parquet files"):
        open_source(f"{tmp_path}/x.zip")
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"x\.parquet is not a parquet file"):
        open_source(f"{tmp_path}/x.parquet").units(8)
    made.write_table(tmp_path / "urls" / "x.parquet", [{"URL": "http://x", "TEXT": "x"}])
    with pytest.raises(
        DataError, match=r"URL, TEXT; expected one of image, jpg, jpeg, png, webp \(--image-key\)"
    ):
        open_source(str(tmp_path / "urls")).units(8)
    made.metadata_jsonl(tmp_path / "nested" / "train")
    with pytest.raises(DataError, match=r"24 times no \.txt caption beside.* metadata\.jsonl .* at its top"):
        open_source(str(tmp_path / "nested"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="without a usable pair: it has no image"):
        open_source(str(tmp_path / "nothing"))
