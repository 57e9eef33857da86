"""What the sampler draws, by values that are known: planted logits, counted draws."""

from typing import ClassVar

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from t2i.model.open_lm import sampling_open_lm
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.sampling_open_lm import choose_codes, draw, image_keys, sample_codes

NUM_TEXT_ROWS, CODEBOOK, NUM_CODES = 20, 9, 4
PAD = NUM_TEXT_ROWS + 6
DRAWS = 4_000
SHARE = 0.03
"""Four standard errors of a share over so many draws."""


def shares(probabilities, **settings):
    logits = torch.tensor(probabilities).log().repeat(DRAWS, 1)
    keys = image_keys(torch.arange(DRAWS), num_codes=1)[:, 0]
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    return (
        torch.bincount(choose_codes(logits, keys, **given), minlength=len(probabilities)) / DRAWS
    ).tolist()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (0.1, 0.5, 0.15, 0.25)),
        # Squares of 0.1, 0.5, 0.15 and 0.25, and their roots, over their sums.
        ({"temperature": 0.5}, (0.0290, 0.7246, 0.0652, 0.1812)),
        ({"temperature": 2.0}, (0.1645, 0.3678, 0.2015, 0.2601)),
        ({"temperature": 0}, (0, 1, 0, 0)),
        ({"top_k": 1}, (0, 1, 0, 0)),
        ({"top_k": 2}, (0, 2 / 3, 0, 1 / 3)),
        ({"top_k": 4}, (0.1, 0.5, 0.15, 0.25)),
        ({"top_k": 9}, (0.1, 0.5, 0.15, 0.25)),
        ({"top_p": 0.49}, (0, 1, 0, 0)),
        ({"top_p": 0.6}, (0, 2 / 3, 0, 1 / 3)),
        ({"top_p": 0.8}, (0, 5 / 9, 1.5 / 9, 2.5 / 9)),
    ],
)
def test_draws_have_the_probabilities_that_the_settings_leave(settings, wanted):
    found = shares((0.1, 0.5, 0.15, 0.25), **settings)
    assert found == pytest.approx(wanted, abs=SHARE)
    assert [share == 0 for share in found] == [share == 0 for share in wanted]


def always_the_same(favourite):
    """A model whose logits are 1 for one image code, and 2 for all that is no image code."""
    layout = {"num_text_rows": NUM_TEXT_ROWS, "num_text_tokens": 18, "codebook_size": CODEBOOK, "multiple": 8}
    config = OpenLMConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        vocab_layout=layout,
        codes_per_image=NUM_CODES,
    )
    model = OpenLMForCausalLM(config).eval()
    logits = torch.full((40,), 2.0)
    logits[PAD + 1 : PAD + 1 + CODEBOOK] = 0
    logits[PAD + 1 + favourite] = 1
    with torch.no_grad():
        model.model.norm.weight.zero_()  # so hidden states are all ones
        model.model.norm.bias.fill_(1)
        model.output.weight.copy_((logits / 8)[:, None].expand(-1, 8))
    return model


class Words:
    """A text tokenizer for which each word is the id that it spells."""

    unk_token = eos_token = None
    added_tokens_decoder: ClassVar[dict] = {}

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def seen(monkeypatch):
    """The arguments of sample_codes, and the codes that are to be decoded."""
    calls = []

    def spy(model, prompts, **settings):
        calls.append({"prompts": prompts, **settings})
        return sample_codes(model, prompts, **settings)

    def decode(_, codes):
        calls[-1]["codes"] = codes.tolist()
        return torch.zeros(len(codes), 3, 4, 4, dtype=torch.uint8)

    monkeypatch.setattr(sampling_open_lm, "sample_codes", spy)
    monkeypatch.setattr(sampling_open_lm, "codes_to_pixels", decode)
    return calls


@pytest.mark.parametrize("favourite", [0, 5, CODEBOOK - 1])
def test_an_exported_model_draws_the_likeliest_code_and_nothing_else(favourite, seen):
    captions = ["3 4", "5 " * 20]
    images = draw(
        always_the_same(favourite), captions, tokenizer=Words(), image_tokenizer=None, temperature=0, seed=7
    )
    (call,) = seen
    assert call["codes"] == [[favourite] * NUM_CODES] * 2
    assert [image.size for image in images] == [(4, 4)] * 2
    # <doc> <text> caption </text> <image>; of 16 positions, 4 are codes and 6 markers.
    assert call["prompts"] == [[20, 22, 3, 4, 23, 24], [20, 22, *[5] * 6, 23, 24]]
    assert call["empty_prompt"] == [20, 22, 23, 24]
    assert list(call["seeds"]) == [7, 8]


def test_one_caption_drawn_twice_gives_two_images(seen):
    model = always_the_same(0)
    with torch.no_grad():
        model.output.weight.zero_()
    draw(model, ["3", "3", "3"], tokenizer=Words(), image_tokenizer=None)
    (call,) = seen
    assert len({tuple(codes) for codes in call["codes"]}) == 3


def test_guidance_adds_the_difference_between_the_captions_logits_and_the_empty_ones():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=36, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()  # whose positions are learned, so that a shifted one shows
    prompts, empty, image_ids = [[1, 2, 3, 4, 5], [6]], [7, 8], range(27, 36)
    settings = {
        "image_ids": image_ids,
        "num_codes": 5,
        "empty_prompt": empty,
        "seeds": [0, 1],
        "temperature": 0,
    }
    found = sample_codes(model, prompts, guidance_scale=2.5, **settings)
    for prompt, codes in zip(prompts, found.tolist(), strict=True):
        made = []
        for _ in range(5):
            with torch.no_grad():
                own, none = (
                    model(torch.tensor([start + made])).logits[0, -1, 27:36] for start in (prompt, empty)
                )
            made.append(27 + int((none + 2.5 * (own - none)).argmax()))
        assert codes == [one - 27 for one in made]
    assert len({tuple(codes) for codes in found.tolist()}) == 2
