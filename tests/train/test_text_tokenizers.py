"""A language model with each kind of text tokenizer, through its life: from its own text to an exported drawing."""

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import VQModel
from train.test_backbones import DS_CONFIG
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from twins.tokenizer_kinds import KINDS, write_tokenizer

from t2i.config import ASSETS, PrepareConfig
from t2i.data.prepare.images import prepare
from t2i.data.prepare.text import prepare_text
from t2i.data.shards.reader import check_shards, read_split
from t2i.data.sources import open_source
from t2i.data.sources.documents import open_documents
from t2i.errors import UserError
from t2i.measure.forgetting import complete, text_cost, text_sequences
from t2i.runs.export import export
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer
from t2i.train.main import train

SPELLED = "picture </s> <s>[SEP] 3"


def language_model(folder, kind, *, more_rows=3):
    tokenizer = TextTokenizer.load(write_tokenizer(kind, folder))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    rows = tokenizer.num_tokens + more_rows
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, max_position_embeddings=256, **sizes)).save_pretrained(
        folder
    )
    return tokenizer


def one_of_each(slow):
    return [pytest.param(kind, marks=pytest.mark.slow if kind in slow else ()) for kind in KINDS]


@pytest.mark.parametrize("kind", one_of_each(set(KINDS) - {"llama-2-metaspace"}))
def test_a_model_lives_with_its_text_tokenizer(kind, finished, tmp_path, monkeypatch):
    tokenizer = language_model(tmp_path / "start", kind)
    (tmp_path / "text.txt").write_text("\n\n".join(f"a red apple {n} and picture {n}" for n in range(600)))
    text = tmp_path / "text"
    prepare_text(
        open_documents(f"text:{tmp_path / 'text.txt'}"),
        out=text,
        text_tokenizer=tokenizer,
        seq_len=90,
        heldout_share=0.2,
    )
    assert check_shards(text)["train"] > 8
    documents = torch.cat(
        [torch.from_numpy(one["caption_ids"].astype("int64")) for one in read_split(text, "train")]
    )
    after_end = documents[1:][documents[:-1] == tokenizer.end_id]
    if tokenizer.start_ids not in ([], [tokenizer.end_id]):  # the unigram one begins texts as it ends them
        assert after_end.eq(tokenizer.start_ids[0]).all()
    # Captions of these shards have ids of another tokenizer, and are tokenized again.
    config = replace(
        finished,
        run_dir=tmp_path / "run",
        data=replace(finished.data, replay_ratio=0.25, replay_shards=text, seq_len=90),
        model=replace(finished.model, init=str(tmp_path / "start")),
        train=replace(finished.train, max_steps=2, save_every=2, eval_every=2, eval_text=str(text)),
    )
    train(config, ds_config_path=DS_CONFIG)
    assert any(row.get("split") == "text" for row in read_metrics(config.run_dir))
    opened = open_model(str(config.run_dir), needs_images=True)
    assert opened.text_tokenizer.fingerprint() == tokenizer.fingerprint()
    held = text_sequences(str(text), tokenizer=opened.text_tokenizer, seq_len=90, num_sequences=4)
    assert text_cost(opened.model, held, layout=opened.layout).num_tokens == 4 * 89
    completions = complete(
        opened.model, ["a red", ""][: 1 + bool(tokenizer.start_ids)], tokenizer=opened.text_tokenizer,
        layout=opened.layout, max_new_tokens=4,
    )  # fmt: skip
    assert all("<doc>" not in text for text in completions)
    export(opened, out=tmp_path / "exported", command="a test")
    assert (
        open_model(str(tmp_path / "exported"), needs_images=True).text_tokenizer.num_tokens
        == tokenizer.num_tokens
    )
    drawn_by_the_export(tmp_path / "exported", tokenizer, monkeypatch)


def drawn_by_the_export(folder, tokenizer, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "draw"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    script = importlib.import_module("draw")
    theirs = AutoTokenizer.from_pretrained(folder)
    images = script.draw(
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        [SPELLED, ""],
        tokenizer=theirs,
        image_tokenizer=VQModel.from_pretrained(folder / "image_tokenizer").eval(),
    )
    assert [image.size for image in images] == [(64, 64)] * 2


@pytest.mark.parametrize("kind", ["llama-2-normalizer", "unigram"])
def test_captions_are_prepared_by_any_kind(kind, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number, caption in enumerate(["a red apple", SPELLED, "  a green house ", "picture 12"]):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(caption)
    tokenizer = TextTokenizer.load(write_tokenizer(kind, tmp_path / "tokenizer"))
    out = tmp_path / "shards"
    prepare(
        open_source(str(tmp_path / "images"), heldout_share=0),
        out=out,
        image_tokenizer=ImageTokenizer.load(ASSETS / "image_tokenizer"),
        text_tokenizer=tokenizer,
        config=PrepareConfig(),
    )
    kept = TextTokenizer.load(out / "text_tokenizer")
    for sample in read_split(out, "train"):
        assert sample["caption_ids"].tolist() == kept.encode(sample["caption"]).tolist()
        ids = torch.from_numpy(sample["caption_ids"].astype("int64"))
        # The unigram model has never seen a bracket.
        assert kept.decode(ids) == sample["caption"] or (kind == "unigram" and "[" in sample["caption"])
    assert check_shards(out)["train"] == 4


def test_more_ids_than_embeddings_is_one_sentence_before_the_first_step(finished, tmp_path):
    tokenizer = language_model(tmp_path / "start", "llama-2-metaspace", more_rows=-2)
    config = replace(
        finished, run_dir=tmp_path / "run", model=replace(finished.model, init=str(tmp_path / "start"))
    )
    rows = tokenizer.num_tokens - 2
    with pytest.raises(
        UserError, match=rf"has {rows + 2} ids; the language model has {rows} embeddings\. Without"
    ):
        train(config, ds_config_path=DS_CONFIG)
    with pytest.raises(
        UserError, match=rf"has {rows + 2} ids; the model of .*start has {rows} embeddings\. Without"
    ):
        open_model(str(tmp_path / "start"), needs_images=False)
