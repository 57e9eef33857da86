"""Captions to images: which codes, which seeds, and that nothing is left out."""

import pytest
import torch
from PIL import Image

from t2i.config import SampleConfig
from t2i.generate import sample as draw
from t2i.generate.sample import draw_codes, draw_folder, drawer_of
from t2i.runs.loading import open_model


@pytest.fixture
def opened(model_folder):
    return open_model(str(model_folder), needs_images=True)


def test_the_likeliest_code_is_drawn_though_other_rows_are_likelier(opened):
    model, layout = opened.model, opened.layout
    logits = torch.full((layout.vocab_size,), 2.0)
    first = layout.num_text_rows + 7  # six markers and <pad>
    logits[first : first + layout.codebook_size] = 0
    logits[first + 300] = 1
    with torch.no_grad():
        model.model.norm.weight.zero_()  # so hidden states are all ones
        model.model.norm.bias.fill_(1)
        model.output.weight.copy_((logits / 32)[:, None].expand(-1, 32))
    codes = draw_codes(drawer_of(opened, settings=SampleConfig(temperature=0)), ["a cup", "a longer caption"])
    assert codes.tolist() == [[300] * 16] * 2


@pytest.fixture
def drawn(opened, monkeypatch, tmp_path):
    """Draw five alike captions in batches of two; yields the calls that drew them, and the images."""

    def draw_all(**settings):
        calls = []

        def spy(drawer, captions, *, first_seed):
            calls.append((list(captions), first_seed))
            return draw_codes(drawer, captions, first_seed=first_seed)

        monkeypatch.setattr(draw, "draw_codes", spy)
        captions = {f"{index}": "a cup" for index in range(5)}
        paths = draw_folder(
            opened, captions, out=tmp_path / "out", config=SampleConfig(seed=40), batch_size=2, **settings
        )
        return calls, paths

    return draw_all


def test_every_caption_is_drawn_by_a_seed_of_its_own(drawn):
    calls, paths = drawn()
    assert calls == [(["a cup"] * 2, 40), (["a cup"] * 2, 42), (["a cup"], 44)]
    assert [path.name for path in paths] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert len({Image.open(path).tobytes() for path in paths}) == 5


def test_ranks_take_whole_batches_in_turn(drawn):
    calls, paths = drawn(rank=1, world_size=2)
    assert calls == [(["a cup"] * 2, 42)]
    assert [path.exists() for path in paths] == [False, False, True, True, False]


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1_000.0},
        {"guidance_scale": 0.0, "temperature": 0.001},
        {"temperature": 1_000.0, "top_k": 10**12},
        {"top_p": 1e-300, "top_k": 1},
        {"seed": 2**63 - 1},
    ],
)
def test_settings_at_the_ends_of_their_ranges_draw_codes(opened, settings):
    drawer = drawer_of(opened, settings=SampleConfig(**settings))
    with torch.no_grad():
        drawer.model.output.weight.mul_(100)  # logits of some hundreds, as a trained model may have
    codes = draw_codes(drawer, ["a cup", "a hat", ""])
    assert codes.shape == (3, 16) and codes.min() >= 0 and codes.max() < opened.layout.codebook_size


def test_one_caption_is_one_image_and_none_is_refused(opened):
    parts = {"tokenizer": opened.text_tokenizer.tokenizer, "image_tokenizer": opened.image_tokenizer.model}
    one, listed = (opened.model.draw(captions, **parts) for captions in ("picture 3", ["picture 3"]))
    assert len(one) == len(listed) == 1
    assert one[0].tobytes() == listed[0].tobytes()
    with pytest.raises(ValueError, match="no caption"):
        opened.model.draw([], **parts)
