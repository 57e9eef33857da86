"""Yardsticks beside a model's images: each compared with what it says, by features and captions that are known."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.config import SampleConfig
from t2i.measure import score as scoring
from t2i.measure.clip import Clip
from t2i.measure.feature_cache import Reference
from t2i.measure.features import FeatureExtractor
from t2i.measure.images import Pictures
from t2i.measure.protocol import DrawingFacts, RowScore
from t2i.measure.score import Drawing, Rulers, Task, draw_rows, score
from t2i.runs.loading import open_model

OWN_PLACES = [7, 2, 9, 0, 5]
NAMES = "abcde"


def images(count, *, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def images_of(arrays):
    return Pictures(
        [lambda array=array: Image.fromarray(array) for array in arrays], crop=lambda image: image
    )


@pytest.fixture
def task():
    """Five captions, whose own images are among twelve of the reference."""
    reference = images(12, seed=0)
    return Task(
        data="a test",
        captions={name: f"caption {name}" for name in NAMES},
        captions_rule="all",
        own=images_of(reference[OWN_PLACES]),
        reference=Reference("twelve", images_of(reference), which={}, crop="none", image_size=32),
        own_places=OWN_PLACES,
    )


@pytest.fixture
def drawing(tmp_path):
    return Drawing(tmp_path / "out", SampleConfig(), controls=("shuffled",), batch_size=4)


def test_the_shuffled_row_is_drawn_from_the_captions_of_others(task, drawing, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        scoring,
        "draw_folder",
        lambda _, captions, *, description, **rest: drawn.update({description: captions}),
    )
    assert [*draw_rows(None, task, drawing=drawing)] == ["model", "shuffled"]
    assert drawn["draw model"] == task.captions
    shuffled = drawn["draw shuffled"]
    assert [*shuffled] == [*NAMES] and sorted(shuffled.values()) == sorted(task.captions.values())
    assert all(shuffled[name] != task.captions[name] for name in NAMES)


def test_no_image_is_scored_under_another_caption_of_itself(task, monkeypatch):
    # Two captions of each of two images, side by side as in a list that goes on with second captions.
    both = replace(task, captions=dict.fromkeys("abcd", ""), image_ids=[7, 7, 2, 2])
    both.captions.update({name: f"caption {name}" for name in both.captions})
    of_image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    monkeypatch.setattr(scoring, "embed_captions", lambda captions, clip: of_image)
    monkeypatch.setattr(scoring, "embed_images", lambda arrays, clip: of_image)
    checkpoint = SimpleNamespace(needed_image_tokenizer=lambda: None)
    rows = {"real": RowScore("", n=2, measures={})}
    clip = Clip("a test", "none", None, None, None)
    found = scoring._clip_scores(rows, checkpoint, both, drawn={"model": []}, clip=clip)
    assert (found.rows["model"], found.other_captions) == (100, 0)
    alike = replace(both, captions=dict.fromkeys("abcd", "one caption"))
    found = scoring._clip_scores(rows, checkpoint, alike, drawn={"model": []}, clip=clip)
    assert found.other_captions is None and found.to_json()["clip_score_other_captions"] is None


def mean_colours(arrays):
    return np.asarray(arrays, dtype=np.float64).mean((1, 2))


def frechet(a, b):
    """The trace of (cov_a cov_b)^(1/2) is the sum of the singular values of A B^T, A and B centred and scaled."""
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + sum((x**2).sum() for x in centred) - 2 * overlap


def test_every_row_is_compared_with_its_own_reference(task, drawing, model_folder, monkeypatch, tmp_path):
    extractor = FeatureExtractor(
        name="mean_colour",
        dims=3,
        resize="clean",
        weights_sha256="none",
        resizer=lambda image: image,
        network=lambda pixels: pixels.mean((2, 3)),
        device=torch.device("cpu"),
    )
    drawn = {}
    for seed, row in enumerate(("model", "shuffled"), start=1):
        drawn[row] = [tmp_path / f"{row}-{name}.png" for name in NAMES]
        for path, array in zip(drawn[row], images(5, seed=seed), strict=True):
            Image.fromarray(array).save(path)
    # A caption is an axis. An image's cosine is 0.6 with its own caption and 0.4 with each other one.
    axes = torch.eye(5)
    monkeypatch.setattr(scoring, "embed_captions", lambda captions, clip: axes)
    monkeypatch.setattr(scoring, "embed_images", lambda arrays, clip: (0.4 + 0.2 * axes)[: len(list(arrays))])
    rulers = Rulers(extractor, Clip("a test", "none", None, None, None))
    scores = score(
        open_model(str(model_folder), needs_images=True),
        task,
        drawing=drawing,
        drawn=drawn,
        rulers=rulers,
        facts=DrawingFacts(processes=1, seconds_to_draw=0.0),
    ).to_json()
    reference, made = mean_colours(images(12, seed=0)), mean_colours(images(5, seed=1))
    apart = [place for place in range(12) if place not in OWN_PLACES]
    wanted = {
        "model": frechet(made, reference),
        "shuffled": frechet(mean_colours(images(5, seed=2)), reference),
        "matched": frechet(made, reference[OWN_PLACES]),
        "real": frechet(reference[OWN_PLACES], reference[apart]),
    }
    for row, distance in wanted.items():
        # float32 features of about 127
        assert scores["rows"][row]["fd_mean_colour"] == pytest.approx(distance, rel=1e-3), row
    assert scores["fd_mean_colour"] == scores["rows"]["model"]["fd_mean_colour"]
    assert (scores["rows"]["real"]["n"], scores["rows"]["real"]["n_reference"]) == (5, 7)
    assert scores["clip_score"] == pytest.approx(60)
    assert scores["clip_score_other_captions"] == pytest.approx(40)
