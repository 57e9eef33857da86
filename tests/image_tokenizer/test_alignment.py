"""Codes that are aligned to captions: the sentence encoder, CLIP's loss from codes, and a training that resumes."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_tokenizers import Killed, at_step, kill
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from t2i.data.sources import open_source
from t2i.errors import UserError
from t2i.image_tokenizer import make
from t2i.image_tokenizer import train as image_tokenizer
from t2i.image_tokenizer.alignment import (
    Alignment,
    CaptionTarget,
    SentenceEncoder,
)
from t2i.image_tokenizer.codebook import Codebook
from t2i.image_tokenizer.make import make_tokenizer
from t2i.image_tokenizer.train import train_image_tokenizer

WORDS = ("[PAD]", "[UNK]", "red", "blue", "green", "a", "very", "square")
TINY = replace(tiny_tokenizers.TINY, max_steps=12, save_every=4, revive_every=50)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder of a sentence encoder, tiny and randomly initialised."""
    folder = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_sentence_is_the_mean_of_its_own_tokens(encoder):
    captions = ["red", "a very very green square", "a blue", "red"]
    found = SentenceEncoder.load(encoder).embed(captions)
    assert found.norm(dim=-1).allclose(torch.ones(4)) and torch.equal(found[0], found[3])
    model = BertModel.from_pretrained(encoder).eval()
    for row, caption in zip(found, captions, strict=True):
        ids = torch.tensor([[WORDS.index(word) for word in caption.split()]])  # alone, so without padding
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        assert row.allclose(F.normalize(mean, dim=0), atol=1e-5)


def test_a_folder_that_is_no_encoder_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="--align-to is .*nowhere, which has no config.json"):
        SentenceEncoder.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="cannot be opened as a sentence encoder"):
        SentenceEncoder.load(tmp_path)


def test_the_loss_is_that_of_pairs_among_all_of_the_batch():
    torch.manual_seed(0)
    sentences = F.normalize(torch.randn(9, 5), dim=-1)
    alignment, latents = Alignment(CaptionTarget(sentences), latent_channels=4), torch.randn(3, 4, 2, 2)
    picks = torch.tensor([7, 0, 4])
    features = []
    for image in latents:
        codes = [alignment.head(image[:, row, column]) for row in range(2) for column in range(2)]
        features.append(F.normalize(torch.stack(codes).mean(0), dim=0))
    scores = torch.stack([torch.stack([one @ sentences[pick] for pick in picks]) for one in features]) / 0.07
    wanted = -(scores.log_softmax(0).diagonal() + scores.log_softmax(1).diagonal()).mean() / 2
    assert alignment(latents, torch.zeros(3, 3, 16, 16), picks).allclose(wanted, atol=1e-5)


def coloured(count=24):
    """Make squares of three colours, with a caption's embedding of its own for each colour."""
    kinds = np.arange(count) % 3
    colours = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250]], dtype=np.uint8)[kinds]
    pictures = np.broadcast_to(colours[:, None, None], (count, 16, 16, 3)).copy()
    return pictures, torch.eye(3)[torch.from_numpy(kinds)]


def test_the_encoder_is_moved_by_the_captions_and_only_where_they_weigh(few_latents, tmp_path):
    pictures, sentences = coloured()

    def encoder_after(name, *, weight, embeddings=sentences):
        config = replace(TINY, align_weight=weight)
        model = train_image_tokenizer(
            pictures, config=config, out=tmp_path / name, target=CaptionTarget(embeddings)
        )
        return model.encoder.conv_in.weight

    assert torch.equal(encoder_after("none", weight=0.0), encoder_after("none-again", weight=0.0))
    aligned = encoder_after("aligned", weight=0.5)
    assert not torch.equal(aligned, encoder_after("none-a-third-time", weight=0.0))
    # By the captions themselves: others move it elsewhere.
    assert not torch.equal(
        aligned, encoder_after("others", weight=0.5, embeddings=sentences.flip(0).roll(1, 0))
    )


def test_trainings_of_one_seed_see_the_same_images_however_many_codes_are_revived(
    few_latents, tmp_path, monkeypatch
):
    """Else two tokenizers that differ in the weight of the alignment would differ in their images too."""
    pictures, sentences = coloured()
    step_loss, seen, revive = image_tokenizer._step_loss, {}, Codebook.revive
    for weight, dead in ((0.0, 1), (0.5, 3)):
        picked = seen.setdefault(weight, [])

        def of_step(trained, batch, *rest, picked=picked):
            picked.append((batch[0].clone(), batch[1].clone()))
            return step_loss(trained, batch, *rest)

        def revive_some(codebook, latents, *, generator, dead=dead):
            codebook.counts[:dead] = 0.0
            return revive(codebook, latents, generator=generator)

        monkeypatch.setattr(image_tokenizer, "_step_loss", of_step)
        monkeypatch.setattr(Codebook, "revive", revive_some)
        config = replace(TINY, align_weight=weight, revive_every=2)
        train_image_tokenizer(
            pictures, config=config, out=tmp_path / str(weight), target=CaptionTarget(sentences)
        )
    assert len(seen[0.0]) == TINY.max_steps
    for (one, picks), (other, others) in zip(seen[0.0], seen[0.5], strict=True):
        assert torch.equal(picks, others) and torch.equal(one, other)


def test_codes_come_to_tell_captions_apart(few_latents, tmp_path, monkeypatch):
    pictures, sentences = coloured()
    losses, forward = [], Alignment.forward
    monkeypatch.setattr(Alignment, "forward", lambda *args: losses.append(forward(*args)) or losses[-1])
    config = replace(TINY, max_steps=60, lr=5e-3, channel_swap_share=0.0, batch_size=12)
    train_image_tokenizer(pictures, config=config, out=tmp_path, target=CaptionTarget(sentences))
    # Four of twelve share a caption, so telling the three apart leaves ln 4.
    assert float(losses[0]) > math.log(12) - 0.3
    assert float(torch.stack(losses[-5:]).mean()) < math.log(4) + 0.5


def test_an_aligned_training_resumes_as_if_it_had_not_stopped(few_latents, tmp_path, monkeypatch):
    pictures, sentences = coloured()
    whole = train_image_tokenizer(
        pictures, config=TINY, out=tmp_path / "whole", target=CaptionTarget(sentences)
    )
    with monkeypatch.context() as patched:
        at_step(patched, 7, kill)
        with pytest.raises(Killed):
            train_image_tokenizer(
                pictures, config=TINY, out=tmp_path / "stopped", target=CaptionTarget(sentences)
            )
    with pytest.raises(UserError, match=r"other settings \(aligned_with\)"):
        train_image_tokenizer(
            pictures,
            config=TINY,
            out=tmp_path / "stopped",
            target=CaptionTarget(sentences),
            aligned_with="other captions",
        )
    resumed = train_image_tokenizer(
        pictures, config=TINY, out=tmp_path / "stopped", target=CaptionTarget(sentences)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_a_source_is_aligned_by_its_captions_and_the_card_says_to_what(few_latents, encoder, tmp_path):
    pictures, _ = coloured(60)
    (tmp_path / "images").mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "images" / f"{index}.txt").write_text(f"a {('red', 'green', 'blue')[index % 3]} square")
    source = open_source(str(tmp_path / "images"))
    make_tokenizer(source, out=tmp_path / "out", config=replace(TINY, align_to=str(encoder)), command="test")
    assert f"- align_to: {encoder}" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_is_no_encoder_is_refused_before_an_image_is_read(encoder, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for index in range(6):
        Image.new("RGB", (16, 16), (40 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "images" / f"{index}.txt").write_text("a square")
    (tmp_path / "broken").mkdir()
    shutil.copy(encoder / "model.safetensors", tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setattr(make, "read_captioned", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(UserError, match="cannot be opened as a sentence encoder"):
        make_tokenizer(
            open_source(str(tmp_path / "images"), heldout_share=0.5),
            out=tmp_path / "out",
            config=replace(TINY, align_to=str(tmp_path / "broken")),
            command="test",
        )
