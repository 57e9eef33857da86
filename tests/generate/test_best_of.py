"""The best of several images per caption, by the model's likelihoods and by a judge."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.config import SampleConfig
from t2i.errors import UserError
from t2i.generate.best_of import Ranker, caption_gains, code_log_likelihoods, keep_best
from t2i.generate.sample import draw_folder, drawer_of
from t2i.runs.loading import open_model

CAPTIONS = {name: f"a {name} cup" for name in ("red", "blue", "very large green", "grey", "tall")}


@pytest.fixture(scope="module")
def opened(model_folder):
    return open_model(str(model_folder), needs_images=True)


def test_the_highest_score_is_kept_per_caption_and_the_first_of_equals():
    codes = [torch.full((3, 2), turn) for turn in range(3)]
    scores = [torch.tensor(each) for each in ([1.0, 5.0, 2.0], [2.0, 1.0, 2.0], [3.0, 4.0, 1.0])]
    best = keep_best(zip(codes, scores, strict=True))
    assert best.codes.tolist() == [[2, 2], [0, 0], [0, 0]] and best.candidates.tolist() == [2, 0, 0]
    with pytest.raises(ValueError, match="no candidates"):
        keep_best([])


@torch.inference_mode()
def slow_log_likelihood(model, prompt, codes, layout):
    """Read one code after another by the model's own logits."""
    ids, total = list(prompt), 0.0
    for code in codes.tolist():
        logits = model(torch.tensor([ids])).logits[0, -1, layout.image_rows.start : layout.image_rows.stop]
        total += torch.log_softmax(logits.double(), dim=0)[code].item()
        ids.append(layout.image_rows.start + code)
    return total


def test_likelihoods_are_those_of_drawing_code_by_code(opened):
    layout, rng = opened.layout, np.random.default_rng(0)
    prompts = [rng.integers(0, 2_000, size).tolist() for size in (3, 9, 5)]
    codes = torch.from_numpy(rng.integers(0, 1_024, (3, 16)))
    found = code_log_likelihoods(opened.model, prompts, codes, layout=layout)
    wanted = [slow_log_likelihood(opened.model, *each, layout) for each in zip(prompts, codes, strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)  # fp32 hidden states
    null = [7, 8]
    gains = caption_gains(opened.model, prompts, codes, null_prompt=null, layout=layout)
    nulls = [slow_log_likelihood(opened.model, null, each, layout) for each in codes]
    assert gains.tolist() == pytest.approx(np.subtract(wanted, nulls), abs=2e-3)


def draw(opened, out, *, ranker=None, **settings):
    config = SampleConfig(guidance_scale=1, **settings)
    paths = draw_folder(opened, CAPTIONS, out=out, config=config, batch_size=2, ranker=ranker)
    return [np.asarray(Image.open(path)) for path in paths]


def test_each_caption_gets_its_brightest_candidate(opened, tmp_path):
    """Twin: candidate j of caption i alone, by its seed, and the brightest of them."""
    asked = []

    def brightness(images, captions):
        asked.append(captions)
        return [float(np.asarray(image).mean()) for image in images]

    ranker = Ranker("brightness", brightness)
    found = draw(opened, tmp_path / "best", best_of=3, best_by="judge", seed=4, ranker=ranker)
    candidates = [draw(opened, tmp_path / f"{turn}", seed=4 + 5 * turn) for turn in range(3)]
    for place, image in enumerate(found):
        best = max((each[place] for each in candidates), key=lambda each: each.mean())
        np.testing.assert_array_equal(image, best)
    assert asked == [texts for texts in (["a red cup", "a blue cup"],) for _ in range(3)] + asked[3:]
    assert any(not np.array_equal(image, candidates[0][place]) for place, image in enumerate(found))
    # Chosen by another judge, they would be other images.
    with pytest.raises(UserError, match="ranked_by"):
        draw(opened, tmp_path / "best", best_of=3, best_by="judge", seed=4, ranker=replace(ranker, name="b"))


def test_likelihood_chooses_what_fits_the_caption(opened, tmp_path):
    found = draw(opened, tmp_path / "best", best_of=3)
    candidates = [draw(opened, tmp_path / f"{turn}", seed=5 * turn) for turn in range(3)]
    chosen = [
        next(turn for turn in range(3) if np.array_equal(image, candidates[turn][place]))
        for place, image in enumerate(found)
    ]
    assert set(chosen) - {0}


def test_one_of_one_is_drawn_as_before_and_a_judge_must_be_there(opened, tmp_path):
    paths = draw_folder(opened, CAPTIONS, out=tmp_path / "a", config=SampleConfig(), batch_size=2)
    assert "best" not in (tmp_path / "a" / "settings.json").read_text() and len(paths) == 5
    with pytest.raises(UserError, match="--best-by judge expects --judge-url"):
        drawer_of(opened, settings=SampleConfig(best_of=2, best_by="judge"))
    with pytest.raises(UserError, match="--best-of is 1, expected a number >= 2"):
        SampleConfig(best_by="judge")
