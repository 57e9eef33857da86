"""Held-out losses: of which images, under which captions, held against every logit of a tiny model."""

import itertools
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from t2i.config import ASSETS, DataConfig, PrepareConfig
from t2i.data.prepare.images import prepare
from t2i.data.shards.reader import read_split
from t2i.data.sources import open_source
from t2i.measure.heldout import caption_meter, heldout_rows
from t2i.measure.reduce import Interrupted, sum_over_ranks
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

LAYOUT = VocabLayout(num_text_rows=20, num_text_tokens=18, codebook_size=9)
DOC, END_DOC, TEXT, END_TEXT, IMAGE, END_IMAGE, PAD, CODE = range(20, 28)
CONFIG = DataConfig(seq_len=16)
LOSS = 1e-5
"""Sums of a few hundred fp32 losses of about 3, in another order."""


def model_of(layout):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = OpenLMForCausalLM(OpenLMConfig(vocab_size=layout.vocab_size, **sizes)).eval()
    with torch.no_grad():
        model.output.weight.mul_(4)  # so that captions make a difference
    return model


def samples_of(count):
    rng = np.random.default_rng(1)
    return [
        # The last id is the sample's own, so that no two captions are one.
        {"caption_ids": np.append(rng.integers(0, 18, index % 4), index), "codes": rng.integers(0, 9, 4)}
        for index in range(count)
    ]


def losses_of(model, caption, codes):
    """Cost of the text and of the image of one sequence without padding, by every logit."""
    ids = [DOC, TEXT, *caption, END_TEXT, IMAGE, *(CODE + code for code in codes), END_IMAGE, END_DOC]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    costs = [-float(logs[place, following]) for place, following in enumerate(ids[1:])]
    # `<doc>` is no target: costs begin with that of <text>.
    begin = len(caption) + 3
    return costs[1 : len(caption) + 1], costs[begin : begin + len(codes)]


@pytest.mark.parametrize("count", [6, 7])
def test_each_image_is_measured_under_its_own_anothers_and_no_caption(count):
    model, samples = model_of(LAYOUT), samples_of(count)
    meter = caption_meter(model, samples, config=CONFIG, layout=LAYOUT, batch_size=4)
    own, other, empty, text = [], [], [], []
    for place, sample in enumerate(samples):
        stranger = samples[(place + count // 2) % count]
        assert stranger is not sample
        costs, image = losses_of(model, sample["caption_ids"], sample["codes"])
        own += image
        text += costs
        other += losses_of(model, stranger["caption_ids"], sample["codes"])[1]
        empty += losses_of(model, [], sample["codes"])[1]
    wanted = [np.mean(own), np.mean(other), np.mean(empty), np.mean(text)]
    assert [meter.own, meter.wrong, meter.empty, meter.text] == pytest.approx(wanted, abs=LOSS)
    assert min(abs(a - b) for a, b in itertools.pairwise(wanted[:3])) > 100 * LOSS
    assert meter.num_pictures == count


def test_sequences_without_images_or_without_text_have_no_loss_of_them():
    model, samples = model_of(LAYOUT), samples_of(4)
    only_text, only_images = (
        caption_meter(model, samples, config=replace(CONFIG, mode=mode), layout=LAYOUT, batch_size=4)
        for mode in ("text-only", "image-only")
    )
    assert (only_text.own, only_text.wrong, only_text.empty) == (None, None, None)
    assert only_images.text is None
    assert only_images.own == only_images.wrong == only_images.empty


def test_the_held_out_loss_is_that_of_held_out_images(tmp_path):
    rng = np.random.default_rng(2)
    (tmp_path / "ids").mkdir()
    facts = {"vocab_size": 9, "length": 4, "made_by": "a test"}
    (tmp_path / "ids" / "ids.json").write_text(json.dumps(facts))
    rows = [
        {"ids": rng.integers(0, 9, 4).tolist(), "caption": f"number {n}", "key": f"k{n}"} for n in range(40)
    ]
    (tmp_path / "ids" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer, shards = TextTokenizer.load(ASSETS / "text_tokenizer"), tmp_path / "shards"
    source = open_source(f"ids:{tmp_path / 'ids'}", heldout_share=0.4)
    prepare(source, out=shards, image_tokenizer=None, text_tokenizer=tokenizer, config=PrepareConfig())
    layout = VocabLayout(2048, 2048, 9)
    model = model_of(layout)
    measure = partial(heldout_rows, model, layout=layout, tokenizer=tokenizer, num_pictures=5, kept={})
    (row,) = measure(config=DataConfig(shards, seq_len=24))
    heldout = list(read_split(shards, "heldout"))
    spread = [heldout[place * len(heldout) // 5] for place in range(5)]
    assert not {sample["key"] for sample in heldout} & {
        sample["key"] for sample in read_split(shards, "train")
    }
    costs = []
    for sample in spread:
        caption = tokenizer.encode(sample["caption"]).tolist()
        ids = [2048, 2050, *caption, 2051, 2052, *(2055 + code for code in sample["codes"].tolist())]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        costs += [-float(logs[place - 1, ids[place]]) for place in range(len(ids) - 4, len(ids))]
    assert (row["split"], row["num_pictures"]) == ("heldout", 5)
    assert row["image_loss"] == pytest.approx(np.mean(costs), abs=LOSS)
    shutil.rmtree(shards)  # what was read once is kept
    assert measure(config=DataConfig(shards, seq_len=24)) == [row]


@pytest.mark.parametrize("is_training", [True, False])
def test_a_model_is_measured_without_dropout_and_left_as_it_was(is_training):
    model, modes = torch.nn.Dropout().train(is_training), []
    model.device = torch.device("cpu")

    def measure(batch):
        modes.append(model.training)
        return torch.tensor([batch, 1.0])

    settings = {"model": model, "size": 2, "should_stop": lambda: False}
    assert sum_over_ranks([2.0, 3.0], measure, **settings).tolist() == [5, 2]
    assert (modes, model.training) == ([False, False], is_training)
    with pytest.raises(Interrupted):
        sum_over_ranks([2.0], measure, **{**settings, "should_stop": lambda: True})
    assert model.training == is_training
