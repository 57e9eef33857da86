"""What the page draws, while it is drawn, without Gradio."""

import io
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.config import SampleConfig, SamplerConfig
from t2i.errors import UserError
from t2i.generate.sample import decode_images, draw_folder
from t2i.play.asked import Drawing, read_drawing
from t2i.play.comparing import draw_side_by_side
from t2i.play.drawing import NOT_YET, draw_by_rows
from t2i.play.following import Visitors
from t2i.play.opening import painters_of
from t2i.play.png_settings import read_png_settings
from t2i.runs.loading import open_model
from t2i.serve.drawing import batch_drawer
from t2i.serve.waiting import Asked

SAMPLER = SamplerConfig()


@pytest.fixture(scope="module")
def opened(model_folder):
    return open_model(str(model_folder), needs_images=True)


@pytest.fixture(scope="module")
def painter(opened):
    return painters_of([opened], batch_size=2)[0]


def drawn_by(painter, prompt, *, count=1, seed=7, sampler=SAMPLER):
    return list(draw_by_rows(painter, Drawing(prompt, count, seed, sampler), given_up=Event()))


def as_drawn(opened, codes):
    return np.asarray(decode_images(opened.needed_image_tokenizer(), codes)[0]).astype(int)


def test_rows_of_an_image_appear_one_after_the_other(painter, opened):
    steps = drawn_by(painter, "a cat")
    assert [step.passes for step in steps] == [4, 8, 12, 16]
    assert [step.is_finished for step in steps] == [False, False, False, True]
    codes = painter.shape.codes([Asked("a cat", 7)], sampler=SAMPLER)  # (1, 16)
    for row, step in enumerate(steps[:-1], 1):
        image = np.asarray(step.images[0]).astype(int)
        assert (image[8 * row :] == NOT_YET).all()
        so_far = torch.where(torch.arange(16) < 4 * row, codes, 0)
        assert np.abs(image[: 8 * row] - as_drawn(opened, so_far)[: 8 * row]).max() <= 1
    assert np.abs(np.asarray(steps[-1].images[0]).astype(int) - as_drawn(opened, codes)).max() <= 1
    assert steps[0].status().startswith("Drawing: 4 of 16 passes, ")
    assert steps[-1].status().endswith(" s, seed 7.")


def test_one_seed_gives_one_file_whatever_is_in_the_batch_and_it_is_that_of_sample_and_serve(
    painter, opened, tmp_path
):
    alone = drawn_by(painter, "a cat", seed=9)[-1].files[0]
    among = drawn_by(painter, "a cat", count=5, seed=7)[-1].files
    assert among[2] == alone and len(set(among)) == 5
    assert batch_drawer(opened, sampler=SAMPLER, batch_size=2)([Asked("a cat", 9)])[0] == alone
    path = draw_folder(
        opened, {"0": "a cat"}, out=tmp_path / "drawn", config=SampleConfig(seed=9), batch_size=1
    )[0]
    pixels = [np.asarray(Image.open(file)).astype(int) for file in (path, io.BytesIO(alone))]
    # Rounding of the image tokenizer moves a pixel by 1; another code would move some by 4 at least.
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_images_beyond_a_batch_follow_the_finished_ones(painter):
    steps = drawn_by(painter, "a cat", count=3)
    assert [len(step.images) for step in steps] == [2] * 4 + [3] * 4
    assert [len(step.files) for step in steps] == [0, 0, 0, 2, 2, 2, 2, 3]
    assert steps[-1].all_passes == steps[-1].passes == 32
    assert steps[-1].status().endswith("seeds 7 to 9.")


def test_a_drawing_that_is_given_up_ends_within_a_pass(painter):
    given_up = Event()
    steps = draw_by_rows(painter, Drawing("a cat", 16, 0, SAMPLER), given_up=given_up)
    next(steps)
    given_up.set()
    assert len(list(steps)) <= 2
    with painter.busy:  # the model is free again
        pass
    assert drawn_by(painter, "a cat")[-1].is_finished


def test_an_iterator_that_is_closed_ends_its_work(painter):
    given_up = Event()
    steps = draw_by_rows(painter, Drawing("a cat", 16, 0, SAMPLER), given_up=given_up)
    next(steps)
    steps.close()
    assert given_up.is_set()


def test_an_error_while_drawing_is_raised_where_it_is_waited_for(painter, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(painter.shape, "codes", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        drawn_by(painter, "a cat")


def test_a_long_prompt_says_what_is_read(painter):
    last = drawn_by(painter, "a cat " * 100)[-1]
    assert 0 < len(last.read) < 300
    assert drawn_by(painter, "a cat")[-1].read == "a cat"


def test_two_models_draw_by_the_same_seeds(opened):
    painters = painters_of([opened, opened], batch_size=1)
    assert painters[0].name == painters[1].name == str(opened.folder)
    steps = list(draw_side_by_side(painters, Drawing("a cat", 1, 3, SAMPLER), given_up=Event()))
    assert steps[0][1] is None and steps[3][0].is_finished
    assert steps[-1][0].files == steps[-1][1].files
    assert len(steps) == 8


def test_what_a_button_cancels_is_the_work_of_its_tab():
    visitors = Visitors()
    draw, text, other = (
        visitors.begin("page", tab="draw"),
        visitors.begin("page", tab="text"),
        visitors.begin("other", tab="draw"),
    )
    visitors.give_up("page", tab="draw")
    assert (draw.is_set(), text.is_set(), other.is_set()) == (True, False, False)
    visitors.give_up("page")
    assert (text.is_set(), other.is_set()) == (True, False)
    again = visitors.begin("other", tab="draw")
    assert other.is_set() and not again.is_set()
    visitors.give_up_all()
    assert again.is_set()


GOOD = ("a cat", 2, "7", 2.0, 0.9, 50, 1.0)


@pytest.mark.parametrize(
    ("place", "value", "found"),
    [
        (0, 5, "prompt is 5; expected a text"),
        (0, "x" * 4_001, "prompt has 4,001 characters"),
        (1, 0, "number of images is 0; expected a whole number from 1 to 16"),
        (1, 17, "number of images is 17"),
        (1, 1.5, "number of images is 1.5"),
        (1, float("nan"), "number of images is nan"),
        (1, None, "number of images is None"),
        (2, "-1", "seed is '-1'; expected a whole number from 0"),
        (2, "<b>", "seed is '<b>'"),
        (2, "9" * 30, "seed is '999"),
        (2, "²", "seed is '²'"),
        (2, str(2**63 - 2), "seed is '9223372036854775806'"),
        (3, -1, "guidance-scale is -1"),
        (3, True, "guidance is True"),
        (4, "hot", "temperature is 'hot'"),
        (5, -3, "top-k is -3"),
        (6, 0, "top-p is 0"),
        (6, float("inf"), "top-p is inf"),
    ],
)
def test_what_cannot_be_drawn_by_is_a_sentence(place, value, found):
    fields = [*GOOD]
    fields[place] = value
    with pytest.raises(UserError, match=found.replace("(", r"\(")):
        read_drawing(*fields, most_images=16)


def test_fields_become_a_drawing_and_no_seed_is_one_that_can_be_typed():
    drawing = read_drawing(*GOOD, most_images=16)
    assert drawing == Drawing("a cat", 2, 7, SamplerConfig())
    assert [image.seed for image in drawing.images()] == [7, 8]
    chosen = read_drawing("a \ud800 cat", 1, "", 2, 0, 0, 1, most_images=1)
    assert 0 <= chosen.seed < 2**31 and chosen.prompt == "a ? cat"
    assert read_drawing(*GOOD[:2], str(2**63 - 3), *GOOD[3:], most_images=2).seed == 2**63 - 3


def test_a_drawn_png_gives_its_settings_back(painter, opened, tmp_path):
    sampler = SamplerConfig(guidance_scale=3.5, temperature=0.7, top_k=9, top_p=0.95)
    prompt = 'a <script>alert("cat")</script> 猫'
    path = tmp_path / "seed_8.png"
    path.write_bytes(drawn_by(painter, prompt, count=2, sampler=sampler)[-1].files[1])
    found = read_png_settings(path, weights=opened.weights)
    assert (found.prompt, found.seed, found.sampler, found.notes) == (prompt, 8, sampler, ())
    assert "other weights" in read_png_settings(path, weights="another").notes[0]
    (note,) = read_png_settings(path, weights=opened.weights, dtype="bfloat16").notes
    assert "drawn in float32, here it is bfloat16" in note


def test_a_png_of_sample_gives_its_own_seed_back(opened, painter, tmp_path):
    captions = {str(index): "a cat" for index in range(3)}
    paths = draw_folder(opened, captions, out=tmp_path, config=SampleConfig(seed=5), batch_size=2)
    found = read_png_settings(paths[2], weights=opened.weights)
    assert (found.prompt, found.seed, found.notes) == ("a cat", 7, ())
    assert (
        "drawn in float32" in read_png_settings(paths[2], weights=opened.weights, dtype="bfloat16").notes[0]
    )
    again = drawn_by(painter, found.prompt, seed=found.seed, sampler=found.sampler)[-1].images[0]
    assert np.abs(np.asarray(again).astype(int) - np.asarray(Image.open(paths[2]))).max() <= 1


def test_a_png_of_the_best_of_several_gives_the_seed_of_its_candidate(opened, painter, tmp_path):
    config = SampleConfig(seed=5, best_of=3)
    paths = draw_folder(opened, {str(index): "a cat" for index in range(4)}, out=tmp_path, config=config)
    kept = [read_png_settings(path, weights=opened.weights) for path in paths]
    assert any(found.seed != 5 + place for place, found in enumerate(kept))
    for place, (path, found) in enumerate(zip(paths, kept, strict=True)):
        assert (found.seed - 5) % 4 == place and found.notes == ()
        again = drawn_by(painter, found.prompt, seed=found.seed, sampler=found.sampler)[-1].images[0]
        assert np.abs(np.asarray(again).astype(int) - np.asarray(Image.open(path))).max() <= 1


def test_a_file_without_settings_is_a_sentence(tmp_path):
    plain, text = tmp_path / "plain.png", tmp_path / "text.png"
    Image.new("RGB", (8, 8)).save(plain)
    text.write_text("no image")
    with pytest.raises(UserError, match="carries no settings of a drawing: caption, seed, guidance_scale"):
        read_png_settings(plain, weights="")
    with pytest.raises(UserError, match="cannot be read as a PNG file"):
        read_png_settings(text, weights="")


def test_a_png_with_settings_that_are_no_numbers_is_a_sentence(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    facts = {"caption": "a cat", "seed": "7", **{key: str(value) for key, value in vars(SAMPLER).items()}}
    for key, value in (("seed", "9" * 40), ("seed", "x"), ("top_p", "x"), ("top_p", "nan"), ("top_k", "1.5")):
        written = PngInfo()
        for name, fact in {**facts, key: value}.items():
            written.add_text(name, fact)
        Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=written)
        with pytest.raises(UserError):
            read_png_settings(tmp_path / "odd.png", weights="")


def test_drawing_leaves_torchs_own_generator_alone(painter):
    before = torch.get_rng_state()
    drawn_by(painter, "a cat")
    assert torch.equal(before, torch.get_rng_state())
