"""Several codes per pass: the image of one code per pass, in fewer passes."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.decoding_any_open_lm import RowDecoder
from t2i.model.open_lm.decoding_open_lm import Decoder
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.race_open_lm import Draws
from t2i.model.open_lm.sampling_open_lm import sample_codes
from t2i.model.open_lm.window_open_lm import LEAST_GUESSES, WINDOWS, Pace, pace_of

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1], [2, 2]]
SETTINGS = {"image_ids": range(40, 56), "num_codes": 24, "empty_prompt": [7], "seeds": range(5)}


def tiny(scale=2, **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OpenLMConfig(**{**sizes, "intermediate_size": 48, "max_position_embeddings": 64, **changes})
    model = OpenLMForCausalLM(config).eval()
    # At scale 1, as it is initialised, hidden states hardly depend on what was read: every guess would be right.
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    # In float64 rounding decides nothing, so a difference is a mistake.
    return model.double()


@pytest.fixture
def reads(monkeypatch):
    """The shape of ids of each pass."""
    shapes, read = [], Decoder.read

    def spy(self, ids, starts):
        shapes.append(tuple(ids.shape))
        return read(self, ids, starts)

    monkeypatch.setattr(Decoder, "read", spy)
    return shapes


@pytest.mark.parametrize("positions", ["rotary", "head_rotary"])
@pytest.mark.parametrize(
    "how",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "temperature": 0.9, "top_k": 5},
        {"guidance_scale": 2.0, "top_p": 0.8},
        {"guidance_scale": 2.0, "temperature": 0},
    ],
    ids=str,
)
def test_every_window_draws_the_codes_of_one_code_per_pass(how, positions, reads):
    model = tiny(positional_embedding_type=positions, qk_norm=True)
    settings = {**SETTINGS, **how}
    one_by_one = sample_codes(model, PROMPTS, window=1, **settings)
    assert not reads and len(one_by_one.unique()) > 4
    for window in (2, 5, 40, "auto"):
        assert torch.equal(sample_codes(model, PROMPTS, window=window, **settings), one_by_one)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        # No position more than the longest prompt and the codes take.
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 29}),
    ],
)
def test_transformers_own_classes_have_windows_too(kind, changes, monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **{**sizes, "intermediate_size": 48, "pad_token_id": 0, **changes})
    model = AutoModelForCausalLM.from_config(config).eval().double()
    widths, read = [], RowDecoder.read
    monkeypatch.setattr(
        RowDecoder, "read", lambda self, ids, starts: widths.append(ids.shape) or read(self, ids, starts)
    )
    settings = {**SETTINGS, "guidance_scale": 2.0, "top_k": 5}
    one_by_one = sample_codes(model, PROMPTS, window=1, **settings)
    widths.clear()  # of the trial that tells whether the class is served
    assert torch.equal(sample_codes(model, PROMPTS, window=4, **settings), one_by_one)
    assert (10, 4) in widths and len(widths) < 23 and widths[-1][0] < 10


def test_right_guesses_save_passes_and_finished_images_leave(reads):
    model = tiny(scale=1)  # surer of itself: most guesses are right
    sample_codes(model, PROMPTS, guidance_scale=2.0, window=4, **SETTINGS)
    rows = [shape[0] for shape in reads]
    # With guidance two rows per image. Images finish at different passes, and all in fewer than 23.
    assert rows[0] == 10 and rows == sorted(rows, reverse=True) and rows[-1] < 10
    assert sum(rows) < 0.6 * 10 * 23
    assert max(shape[1] for shape in reads) == 4


def test_a_model_that_repeats_itself_is_drawn_in_an_eighth_of_the_passes(reads):
    model = tiny()
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.weight[43] = 1
        model.model.norm.weight.zero_()
        model.model.norm.bias.fill_(1)
    codes = sample_codes(model, PROMPTS, guidance_scale=2.0, temperature=0, window=8, **SETTINGS)
    assert codes.unique().tolist() == [3]
    # The first code comes from the prompt, and 23 others from 8, 8 and 7.
    assert reads == [(10, 8), (10, 8), (10, 7)]


def paced(seconds_of, chance):
    """The windows that a pace chooses, where passes take so long and guesses are right with that chance."""
    pace, chosen = Pace(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        window = pace.window()
        chosen.append(window)
        right = (torch.rand(window - 1, generator=generator) < chance).tolist()
        kept = 1 + len([*itertools.takewhile(bool, right)])
        pace.saw(window, seconds=seconds_of(window), num_kept=[kept])
    return pace, chosen


@pytest.mark.parametrize(
    ("seconds_of", "chance", "last"),
    [
        (lambda window: window, 0.6, {1}),  # bound by arithmetic: a guess costs what a code costs
        (lambda window: 10 + 0.1 * window, 0.95, {16, 32}),  # bound by memory
        (lambda window: 1 + window, 0.0, {1}),
        (lambda window: 5 + window, 0.7, {2, 4, 8}),
    ],
)
def test_the_window_is_the_one_with_most_codes_per_second(seconds_of, chance, last):
    pace, chosen = paced(seconds_of, chance)
    assert chosen[-1] in last
    assert pace.pays == (chosen[-1] > 1)
    # What does not pay was tried by few passes of two codes, and by nothing wider.
    if last == {1}:
        assert max(chosen) == 2 and chosen.count(2) <= LEAST_GUESSES + 1


def test_a_window_that_does_not_pay_is_left_for_one_code_per_pass(reads, monkeypatch):
    model = tiny()
    settings = {**SETTINGS, "guidance_scale": 2.0}
    one_by_one = sample_codes(model, PROMPTS, window=1, **settings)
    monkeypatch.setattr(
        Pace, "window", lambda pace: WINDOWS[min(sum(map(len, pace.seconds.values())) // 2, 1)]
    )
    monkeypatch.setattr(
        Pace, "pays", property(lambda pace: False if len(pace.seconds.get(2, ())) > 1 else None)
    )
    assert torch.equal(sample_codes(model, PROMPTS, **settings), one_by_one)
    assert [shape[1] for shape in reads] == [2, 2]
    # The model remembers it.
    assert torch.equal(sample_codes(model, PROMPTS, **settings), one_by_one)
    assert len(reads) == 2


def test_auto_is_one_code_per_pass_in_16_bits():
    how = Draws(range(40, 56), 1.0, 1.0, 0, 1.0)
    half = tiny().to(torch.bfloat16)
    assert pace_of("auto", model=half, num_images=1, how=how) == 1
    assert pace_of(4, model=half, num_images=1, how=how) == 4
    assert isinstance(pace_of("auto", model=tiny(), num_images=1, how=how), Pace)


def test_a_decoder_without_windows_draws_one_code_per_pass(reads, monkeypatch):
    model = tiny()
    wanted = sample_codes(model, PROMPTS, window=1, **SETTINGS)
    monkeypatch.delattr(Decoder, "read")
    assert torch.equal(sample_codes(model, PROMPTS, window=8, **SETTINGS), wanted)


@pytest.mark.parametrize(("window", "compiled"), [(0, False), (2, True)])
def test_a_window_that_cannot_be_is_refused(window, compiled):
    with pytest.raises(ValueError, match=f"window is {window}; expected auto or a number >= 1"):
        sample_codes(tiny(), PROMPTS, window=window, is_compiled=compiled, **SETTINGS)
