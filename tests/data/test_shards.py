import hashlib
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.config import ASSETS, DataConfig, PrepareConfig
from t2i.data.loader import StepLoader
from t2i.data.prepare import images as preparing
from t2i.data.prepare.decode import views
from t2i.data.prepare.images import prepare
from t2i.data.shards import reader as shards
from t2i.data.shards.baselines import code_floors
from t2i.data.shards.reader import spread
from t2i.data.sources import open_source
from t2i.errors import DataError, UserError
from t2i.tokens.image import ImageTokenizer, centre_crop_resize, images_of, shifted, to_pixels
from t2i.tokens.sequence import decode_sequence
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

CONFIG = PrepareConfig(unit_pairs=8, batch_size=4)


@pytest.fixture(scope="module")
def image_tokenizer():
    return ImageTokenizer.load(ASSETS / "image_tokenizer")


@pytest.fixture(scope="module")
def text_tokenizer():
    return TextTokenizer.load(ASSETS / "text_tokenizer")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(40):
        pixels = np.full((70, 64, 3), rng.integers(0, 255, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"picture number {index} <image>")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a broken picture")
    return folder


@pytest.fixture(scope="module")
def source(pictures):
    return open_source(str(pictures), heldout_share=0.2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, source, image_tokenizer, text_tokenizer):
    out = tmp_path_factory.mktemp("shards") / "made"
    prepare(source, out=out, image_tokenizer=image_tokenizer, text_tokenizer=text_tokenizer, config=CONFIG)
    return out


def test_every_pair_is_found_again_with_the_codes_of_its_image(
    prepared, source, image_tokenizer, text_tokenizer
):
    found = {s["key"]: s for split in ("train", "heldout") for s in shards.read_split(prepared, split)}
    assert sorted(found) == [f"{index:02d}.png" for index in range(40)]
    for pair in source.pairs[:5]:
        image = centre_crop_resize(pair.open().image, size=64)
        assert found[pair.key]["codes"].tolist() == image_tokenizer.encode(to_pixels([image]))[0].tolist()
        assert found[pair.key]["codes"].dtype == np.uint16
        assert text_tokenizer.decode(torch.tensor(found[pair.key]["caption_ids"].astype(int))) == pair.caption


def test_the_manifest_counts_and_broken_images_are_listed(prepared):
    manifest = shards.read_manifest(prepared)
    assert sum(manifest.counts.values()) == 40
    assert manifest.counts["train"] > manifest.counts["heldout"] > 0
    assert manifest.broken == 1
    assert json.loads((prepared / "broken.jsonl").read_text())["key"] == "broken.png"
    assert manifest.floors_nats["train"]["uniform"] == pytest.approx(np.log(manifest.codebook_size))


def test_a_killed_preparation_goes_on_and_ends_the_same(
    tmp_path, prepared, source, image_tokenizer, text_tokenizer, monkeypatch
):
    calls = itertools.count()

    def die(*args, **kwargs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args, **kwargs)

    encode = preparing.write_unit
    monkeypatch.setattr(preparing, "write_unit", die)
    arguments = {"image_tokenizer": image_tokenizer, "text_tokenizer": text_tokenizer, "config": CONFIG}
    with pytest.raises(KeyboardInterrupt):
        prepare(source, out=tmp_path / "made", **arguments)
    prepare(source, out=tmp_path / "made", **arguments)
    assert next(calls) == 4 + 3  # three units, the killed one, and the three that were missing of six
    for path in prepared.rglob("*.mds"):
        assert (tmp_path / "made" / path.relative_to(prepared)).read_bytes() == path.read_bytes()


def test_other_arguments_are_refused(prepared, source, image_tokenizer, text_tokenizer):
    with pytest.raises(UserError, match="unit_pairs: 8 there, 9 here"):
        prepare(
            source,
            out=prepared,
            image_tokenizer=image_tokenizer,
            text_tokenizer=text_tokenizer,
            config=replace(CONFIG, unit_pairs=9),
        )


def test_another_image_tokenizer_is_refused(prepared, image_tokenizer):
    shards.check_image_tokenizer(prepared, image_tokenizer)
    other = ImageTokenizer.load(ASSETS / "image_tokenizer")
    other.model.quantize.embedding.weight.data[0] += 1
    with pytest.raises(DataError, match="was made by another image tokenizer"):
        shards.check_image_tokenizer(prepared, other)


def test_decoding_refuses_codes_outside_the_codebook(image_tokenizer):
    assert images_of(image_tokenizer.decode(torch.zeros(2, 64, dtype=torch.long))).shape == (2, 64, 64, 3)
    with pytest.raises(ValueError, match="found codes 1024 to 1024; expected 0 to"):
        image_tokenizer.decode(torch.full((1, 64), image_tokenizer.codebook_size))
    with pytest.raises(ValueError, match="do not fill a square"):
        image_tokenizer.decode(torch.zeros(1, 63, dtype=torch.long))


def test_floors_equal_a_counted_twin():
    rng = np.random.default_rng(0)
    codes = {"train": rng.integers(0, 4, (50, 9)) ** 2 % 5, "heldout": rng.integers(0, 5, (20, 9))}
    floors = code_floors(codes, codebook_size=5)
    counts = [(codes["train"] == code).sum() for code in range(5)]
    unigram = [(count + 1 / 5) / (450 + 1) for count in counts]
    cost = 0.0
    for row in codes["heldout"]:
        cost -= np.log(unigram[row[0]])
        for before, code in itertools.pairwise(row):
            both = sum((r[:-1] == before)[r[1:] == code].sum() for r in codes["train"])
            total = (codes["train"][:, :-1] == before).sum()
            cost -= np.log((both + 10 * unigram[code]) / (total + 10))
    assert floors["heldout"]["bigram"] == pytest.approx(cost / 180)
    assert floors["train"]["unigram"] == pytest.approx(
        -np.log([unigram[c] for c in codes["train"].ravel()]).mean()
    )


def test_a_single_code_per_image_costs_by_its_own_frequency_alone():
    floors = code_floors({"train": np.array([[0], [0], [1]]), "heldout": np.array([[0]])}, codebook_size=2)
    unigram = -np.log((2 + 1 / 2) / (3 + 1))
    assert floors["heldout"]["bigram"] == floors["heldout"]["unigram"] == pytest.approx(unigram)
    assert all(np.isfinite(cost) for split in floors.values() for cost in split.values())


def loader_of(shard_folder: Path, tokenizer, **changes) -> StepLoader:
    config = DataConfig(shards=shard_folder, **{"seq_len": 90, **changes})
    layout = VocabLayout(num_text_rows=2048, num_text_tokens=2048, codebook_size=512)
    layout = replace(layout, codebook_size=shards.read_manifest(shard_folder).codebook_size)
    return StepLoader(config, layout=layout, global_batch=8, world_size=1, seed=3, tokenizer=tokenizer)


def first_batches(loader, count):
    return [batch["input_ids"].tolist() for batch in itertools.islice(iter(loader), count)]


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_order_does_not_depend_on_workers_and_resumes_in_mid_epoch(prepared, text_tokenizer, nodes):
    settings = {"num_canonical_nodes": nodes}
    batches = first_batches(loader_of(prepared, text_tokenizer, **settings), 8)
    assert first_batches(loader_of(prepared, text_tokenizer, num_workers=2, **settings), 8) == batches
    begun = loader_of(prepared, text_tokenizer, **settings)
    assert first_batches(begun, 5) == batches[:5]
    resumed = loader_of(prepared, text_tokenizer, **settings)
    resumed.load_state_dict(begun.state_dict())
    assert first_batches(resumed, 3) == batches[5:]
    other = first_batches(loader_of(prepared, text_tokenizer, num_canonical_nodes=3 - nodes), 1)
    assert other != batches[:1]  # the parts are shuffled each in itself, so the order is another


def test_captions_are_dropped_by_hash_and_images_kept(prepared, text_tokenizer):
    loader = loader_of(prepared, text_tokenizer, caption_dropout=0.5)
    layout = loader.streams[0].loader.dataset.layout
    batch = next(iter(loader))
    for ids, key in zip(batch["input_ids"], batch["key"], strict=True):
        caption_ids, codes = decode_sequence(ids, layout=layout)
        digest = hashlib.sha256(f"caption dropout\x1f3\x1f0\x1f{key}".encode()).digest()
        assert (len(caption_ids) == 0) == (digest[0] < 128)  # the first bit decides about a half
        assert len(codes) == 64


def test_every_nth_sample_alone_is_read_again_and_again(prepared, text_tokenizer):
    keys = [sample["key"] for sample in shards.read_split(prepared, "train")]
    loader = loader_of(prepared, text_tokenizer, subsample_every=3)
    seen = {key for _, batch in zip(range(len(keys)), loader, strict=False) for key in batch["key"]}
    assert seen == set(keys[::3])
    with pytest.raises(UserError, match="data.subsample_every is 0; expected a whole number >= 1"):
        loader_of(prepared, text_tokenizer, subsample_every=0)


def test_a_shard_that_a_subset_reads_is_hashed_before(prepared, text_tokenizer, tmp_path):
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    dataset = loader_of(copy, text_tokenizer, subsample_every=3).streams[0].loader.dataset
    shards = [
        (at, dataset.spanner[at][0], dataset.spanner[at - at % 3][0]) for at in range(dataset.num_samples)
    ]
    at, _, read = next(one for one in shards if one[1] != one[2])
    file = copy / "train" / dataset.shards[read].raw_data.basename
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="has xxh64"):
        dataset[at]


def test_too_few_samples_for_a_step_are_refused(prepared, text_tokenizer):
    with pytest.raises(UserError, match="training sequences; one step takes 64"):
        StepLoader(
            DataConfig(shards=prepared),
            layout=VocabLayout(2048, 2048, 512),
            global_batch=64,
            world_size=1,
            seed=0,
            tokenizer=text_tokenizer,
        )


def test_views_shift_training_images_only(source):
    for pair in source.pairs[:12]:
        assert len(views(pair, pair.open().image, PrepareConfig(views=4))) == (
            4 if pair.split == "train" else 1
        )


def test_a_shift_moves_the_image_and_repeats_its_edge():
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    moved = np.asarray(shifted(Image.fromarray(pixels), right=1, down=-2))
    assert (moved[:2, 1:] == pixels[2:, :3]).all()
    assert (moved[:2, 0] == pixels[2:, 0]).all()
    assert (moved[2:, 1:] == pixels[3, :3]).all()


@pytest.mark.parametrize(("num", "count"), [(4_000, 2_048), (6_143, 2_048), (7, 7), (3, 8), (9, 1), (0, 5)])
def test_a_choice_of_samples_is_spread_over_all_of_them(num, count):
    chosen = spread(range(num), count)
    assert len(chosen) == len(set(chosen)) == min(num, count)
    gaps = [later - earlier for earlier, later in itertools.pairwise([*chosen, num])]
    assert not gaps or max(gaps) - min(gaps) <= 1
