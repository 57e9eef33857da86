"""What a step is made of: which samples, of which split, under which captions. Ids are given, nothing is encoded."""

import hashlib
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streaming.base.shared import prefix

from t2i.config import ASSETS, DataConfig, PrepareConfig
from t2i.data.batching import num_text_sequences
from t2i.data.loader import StepLoader, check_nodes, num_ordered, num_trained_on
from t2i.data.prepare.images import prepare
from t2i.data.shards.baselines import code_floors
from t2i.data.shards.reader import check_sample, read_manifest, read_split
from t2i.data.sources import open_source
from t2i.errors import DataError, UserError
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

CODEBOOK, NUM_CODES, NUM_PAIRS, A_STEP, SEED = 30, 5, 60, 8, 3
TEXT_ROWS = 2048
TEXT, END_TEXT, FIRST_CODE = TEXT_ROWS + 2, TEXT_ROWS + 3, TEXT_ROWS + 7


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load(ASSETS / "text_tokenizer")


@pytest.fixture(scope="module")
def pairs():
    """Captions and codes by key; every sixth caption is empty."""
    codes = np.random.default_rng(0).integers(0, CODEBOOK, (NUM_PAIRS, NUM_CODES))
    captions = ["" if index % 6 == 0 else f"number {index}" for index in range(NUM_PAIRS)]
    return {f"k{index}": (captions[index], row.tolist()) for index, row in enumerate(codes)}


@pytest.fixture(scope="module")
def folder(pairs, tokenizer, tmp_path_factory):
    ids = tmp_path_factory.mktemp("given") / "ids"
    ids.mkdir()
    (ids / "ids.json").write_text(
        json.dumps({"vocab_size": CODEBOOK, "length": NUM_CODES, "made_by": "a test"})
    )
    rows = [{"ids": codes, "caption": caption, "key": key} for key, (caption, codes) in pairs.items()]
    (ids / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = ids.with_name("shards")
    source = open_source(f"ids:{ids}", heldout_share=0.3)
    prepare(
        source, out=out, image_tokenizer=None, text_tokenizer=tokenizer, config=PrepareConfig(unit_pairs=7)
    )
    return out


def keys_of(folder, split):
    return [sample["key"] for sample in read_split(folder, split)]


def loader_of(folder, tokenizer, **settings):
    config = DataConfig(shards=folder, **{"seq_len": 24, "caption_dropout": 0.0, **settings})
    layout = VocabLayout(TEXT_ROWS, TEXT_ROWS, CODEBOOK)
    return StepLoader(
        config, layout=layout, global_batch=A_STEP, world_size=1, seed=SEED, tokenizer=tokenizer
    )


def caption_of(ids):
    """Cut the caption's ids out of one sequence."""
    ids = ids.tolist()
    return ids[ids.index(TEXT) + 1 : ids.index(END_TEXT)]


def epochs_of(loader, count):
    """Read steps until `count` epochs are over: for each, the samples of its steps."""
    found = [[] for _ in range(count)]
    for batch in loader:
        if loader.epoch == count:
            return found
        found[loader.epoch] += zip(batch["key"], batch["input_ids"], strict=True)


def test_an_epoch_reads_whole_steps_of_the_training_split_and_each_sample_once(folder, tokenizer, pairs):
    train, heldout = keys_of(folder, "train"), keys_of(folder, "heldout")
    assert sorted([*train, *heldout]) == sorted(pairs) and len(heldout) > 8
    assert len(train) % A_STEP  # some sit out
    epochs = epochs_of(loader_of(folder, tokenizer), 3)
    orders = [[key for key, _ in epoch] for epoch in epochs]
    for keys in orders:
        assert len(keys) == len(set(keys)) == len(train) // A_STEP * A_STEP
        assert set(keys) <= set(train)
    assert len({tuple(keys) for keys in orders}) == 3
    assert set().union(*orders) == set(train)


def test_a_sequence_holds_its_own_caption_and_codes_and_an_empty_caption_no_token(folder, tokenizer, pairs):
    (epoch,) = epochs_of(loader_of(folder, tokenizer), 1)
    assert {pairs[key][0] == "" for key, _ in epoch} == {True, False}
    for key, ids in epoch:
        caption, codes = pairs[key]
        assert caption_of(ids) == tokenizer.encode(caption).tolist()
        assert ids[ids >= FIRST_CODE].tolist() == [FIRST_CODE + code for code in codes]


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files by /proc")
@pytest.mark.parametrize("is_resumed", [False, True])
def test_steps_and_epochs_leave_no_file_open(folder, tokenizer, is_resumed):
    loader = loader_of(folder, tokenizer)
    if is_resumed:
        before = loader_of(folder, tokenizer)
        next(iter(before))
        loader.load_state_dict(before.state_dict())
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    few = open_files()
    for _ in range(40):
        next(batches)
    assert loader.epoch > 3 and open_files() <= few + 1


def is_hashed_below(share, *, epoch, key):
    """The rule of caption dropout, written out: a SHA-256 of seed, epoch and key as a share of its range."""
    digest = hashlib.sha256(f"caption dropout\x1f{SEED}\x1f{epoch}\x1f{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def test_half_of_the_captions_are_dropped_and_others_in_each_epoch(folder, tokenizer, pairs):
    dropped = []
    for epoch, samples in enumerate(epochs_of(loader_of(folder, tokenizer, caption_dropout=0.5), 2)):
        with_caption = [(key, ids) for key, ids in samples if pairs[key][0]]
        dropped.append({key for key, ids in with_caption if not caption_of(ids)})
        assert dropped[-1] == {key for key, _ in with_caption if is_hashed_below(0.5, epoch=epoch, key=key)}
        assert 0.25 < len(dropped[-1]) / len(with_caption) < 0.75
        assert all((ids >= FIRST_CODE).sum() == NUM_CODES for _, ids in samples)
    assert dropped[0] != dropped[1]


@pytest.mark.parametrize(("share", "wanted"), [(0.0, {False}), (1.0, {True})])
def test_no_caption_or_every_one_is_dropped(share, wanted, folder, tokenizer, pairs):
    (epoch,) = epochs_of(loader_of(folder, tokenizer, caption_dropout=share), 1)
    assert {caption_of(ids) == [] for key, ids in epoch if pairs[key][0]} == wanted


def test_a_part_of_a_split_is_spread_over_it(folder):
    keys = keys_of(folder, "train")
    for count in (2, 5, len(keys) - 1, len(keys), len(keys) + 3):
        found = [sample["key"] for sample in read_split(folder, "train", num_samples=count)]
        places = [keys.index(key) for key in found]
        assert len(found) == min(count, len(keys)) and places == sorted(set(places))
        # From the first to nearly the last, with gaps that differ by one at most.
        gaps = np.diff([*places, len(keys)])
        assert places[0] == 0 and gaps.max() - gaps.min() <= 1


def test_a_part_of_a_subsampled_split_is_of_what_training_sees(folder):
    keys = keys_of(folder, "train")[::3]
    for count in (2, len(keys), 10_000):
        samples = read_split(folder, "train", num_samples=count, subsample_every=3)
        found = [sample["key"] for sample in samples]
        assert len(found) == min(count, len(keys)) and set(found) <= set(keys)


def test_a_code_or_an_id_of_one_too_many_is_refused(folder):
    manifest = read_manifest(folder)
    sample = next(iter(read_split(folder, "train")))
    largest = {"codes": np.full(NUM_CODES, CODEBOOK - 1), "caption_ids": np.array([TEXT_ROWS - 1])}
    check_sample({**sample, **largest}, manifest=manifest, where=folder)
    for key, kind, least in (("codes", "codes", CODEBOOK), ("caption_ids", "caption ids", TEXT_ROWS)):
        wrong = {**sample, key: largest[key] + 1}
        with pytest.raises(DataError, match=f"has {kind} up to {least}; expected 0 to {least - 1}"):
            check_sample(wrong, manifest=manifest, where=folder)


@pytest.mark.parametrize(("count", "every", "wanted"), [(10, 1, 10), (10, 3, 4), (9, 3, 3), (2, 5, 1)])
def test_every_nth_sample_counts_the_first(count, every, wanted, folder):
    assert len(range(0, count, every)) == wanted
    assert (
        num_trained_on(replace(read_manifest(folder), counts={"train": count}), subsample_every=every)
        == wanted
    )


def test_a_share_of_text_is_rounded_to_the_nearest_count(folder):
    # 0.29 x 100 is 28.999999999999996 in floating point.
    config = DataConfig(shards=folder, replay_ratio=0.29, replay_shards=folder)
    assert num_text_sequences(config, global_batch=100, world_size=1) == 29


def test_baselines_by_place_and_by_pair_equal_a_counted_twin():
    rng = np.random.default_rng(0)
    codes = {"train": rng.integers(0, 3, (40, 4)) + np.arange(4), "heldout": rng.integers(0, 7, (20, 4))}
    found = code_floors(codes, codebook_size=7)["heldout"]
    train, held = codes["train"].tolist(), codes["heldout"].tolist()
    unigram = [(sum(row.count(code) for row in train) + 1 / 7) / (160 + 1) for code in range(7)]
    by_place, by_pair = [], []
    for row in held:
        by_pair.append(-np.log(unigram[row[0]]))
        for place, code in enumerate(row):
            there = sum(one[place] == code for one in train)
            by_place.append(-np.log((there + 10 * unigram[code]) / (40 + 10)))
        for before, code in itertools.pairwise(row):
            pairs = [pair for one in train for pair in itertools.pairwise(one)]
            both, first = pairs.count((before, code)), sum(one == before for one, _ in pairs)
            by_pair.append(-np.log((both + 10 * unigram[code]) / (first + 10)))
    assert found["position_unigram"] == pytest.approx(np.mean(by_place))
    assert found["bigram"] == pytest.approx(np.mean(by_pair))
    assert found["uniform"] == pytest.approx(np.log(7))


def test_two_runs_that_start_at_once_take_no_name_from_each_other(folder, tokenizer, monkeypatch):
    shared, kept = prefix.SharedMemory, []

    def meets_nobody(name, create, size=0):
        if not create:
            raise FileNotFoundError(name)  # as each of two runs sees it that look before either has begun
        kept.append(shared(name, create, size))
        return kept[-1]

    monkeypatch.setattr(prefix, "SharedMemory", meets_nobody)
    loaders = [loader_of(folder, tokenizer) for _ in range(2)]
    keys = [next(iter(loader))["key"] for loader in loaders]
    assert keys[0] == keys[1] and len(kept) == 2


@pytest.mark.parametrize(
    ("nodes", "canonical", "fits"), [(4, 8, True), (8, 4, True), (3, 4, False), (7, 8, False)]
)
def test_nodes_that_cannot_share_the_order_are_refused(folder, nodes, canonical, fits, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = DataConfig(shards=folder, seq_len=24, num_canonical_nodes=canonical)
    if fits:
        check_nodes(config, world_size=2 * nodes)
    else:
        with pytest.raises(
            UserError, match=f"num_canonical_nodes is {canonical}, on {nodes} nodes; expected"
        ):
            check_nodes(config, world_size=2 * nodes)


def test_the_order_of_an_epoch_is_counted(folder):
    config = DataConfig(shards=folder, seq_len=24)
    assert num_ordered(config) == len(keys_of(folder, "train"))
    assert num_ordered(replace(config, shards=folder / "not here yet")) == 0
