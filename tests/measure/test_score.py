"""Yardsticks beside a model's images: each compared with what it says, by features and captions that are known."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.cli.command_line import read_flags
from t2i.commands.score import ScoreCommand
from t2i.config import SampleConfig
from t2i.files import write_json
from t2i.measure import descriptors, measures
from t2i.measure import pairing as pairs
from t2i.measure import score as scoring
from t2i.measure.clip import Clip
from t2i.measure.extractor import FeatureExtractor
from t2i.measure.feature_cache import Reference
from t2i.measure.images import LazyImages
from t2i.measure.judge import Head, Judge
from t2i.measure.pairing import clip_scores, pairing_of
from t2i.measure.protocol import DrawingFacts
from t2i.measure.score import Drawing, Rulers, Task, draw_rows, score
from t2i.model.open_lm import sampling_open_lm
from t2i.runs.loading import open_model

OWN_PLACES = [7, 2, 9, 0, 5]
NAMES = "abcde"


def images(count, *, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def images_of(arrays):
    return LazyImages(
        [lambda array=array: Image.fromarray(array) for array in arrays], crop=lambda image: image
    )


@pytest.fixture
def task():
    """Five captions, whose own images are among twelve of the reference."""
    reference = images(12, seed=0)
    return Task(
        data="a test",
        captions={name: f"red thing {name}" for name in NAMES},
        captions_rule="all",
        own=images_of(reference[OWN_PLACES]),
        reference=Reference("twelve", images_of(reference), which={}, crop="none", image_size=32),
        own_places=OWN_PLACES,
    )


@pytest.fixture
def drawing(tmp_path):
    return Drawing(tmp_path / "out", SampleConfig(), controls=("redrawn",), batch_size=4)


def test_the_redrawn_row_has_the_captions_and_other_seeds(task, drawing, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        scoring,
        "draw_folder",
        lambda _, captions, *, description, config, **rest: drawn.update({description: (captions, config)}),
    )
    assert [*draw_rows(None, task, drawing=drawing)] == ["model", "redrawn"]
    (captions, first), (again, second) = drawn["draw model"], drawn["draw redrawn"]
    assert captions == again == task.captions
    seeds = [set(range(config.seed, config.seed + 5)) for config in (first, second)]
    assert not seeds[0] & seeds[1] and replace(second, seed=first.seed) == first


def test_the_flag_window_reaches_the_drawing_and_changes_no_image(
    task, drawing, model_folder, tmp_path, monkeypatch
):
    windows, by_window = [], sampling_open_lm.sample_by_window

    def spy(*given, pace, **rest):
        windows.append(pace)
        return by_window(*given, pace=pace, **rest)

    monkeypatch.setattr(sampling_open_lm, "sample_by_window", spy)
    opened, drawn = open_model(str(model_folder), needs_images=True), []
    for window in ("1", "4"):
        command = read_flags(ScoreCommand, [str(model_folder), "--window", window])
        how = replace(drawing, out=tmp_path / window, config=command.sample, controls=())
        paths = draw_rows(opened, task, drawing=how)["model"]
        drawn.append([Image.open(path).tobytes() for path in paths])
    # Five captions are two batches of at most four.
    assert windows == [4, 4] and drawn[0] == drawn[1]


def pairing(task, drawn, *, num_real=5):
    return pairing_of(
        task.captions,
        task.own,
        image_ids=task.image_ids,
        num_real=num_real,
        drawn=drawn,
        tokenizer=None,
    )


def test_no_image_is_scored_under_another_caption_of_itself(task, monkeypatch):
    # Two captions of each of two images, side by side as in a list that goes on with second captions.
    both = replace(task, captions=dict.fromkeys("abcd", ""), image_ids=[7, 7, 2, 2])
    both.captions.update({name: f"caption {name}" for name in both.captions})
    of_image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    monkeypatch.setattr(pairs, "embed_captions", lambda captions, clip: of_image)
    monkeypatch.setattr(pairs, "embed_images", lambda arrays, clip: of_image)
    clip = Clip("a test", "none", None, None, None)
    found = clip_scores(pairing(both, {"model": []}, num_real=4), clip)
    assert (found.rows["model"], found.other_captions, found.rows["mismatched"]) == (100, 0, 0)
    alike = replace(both, captions=dict.fromkeys("abcd", "one caption"))
    found = clip_scores(pairing(alike, {"model": []}, num_real=4), clip)
    assert found.other_captions is None and found.to_json()["clip_score_other_captions"] is None
    assert "mismatched" not in found.rows


def test_images_stand_beside_their_captions_and_those_of_others(task):
    found = pairing(task, {"model": [], "untrained": []}, num_real=3)
    assert {name: row.images for name, row in found.rows.items()} == {
        "model": "model",
        "untrained": "untrained",
        "real": "real",
        "reconstructions": "reconstructions",
        "other_captions": "model",
        "mismatched": "real",
    }
    matched = list(task.captions.values())
    assert found.captions_of("model") == found.captions_of("reconstructions") == matched
    assert found.captions_of("real") == matched[:3] and len(list(found.sets["real"])) == 3
    for name in ("other_captions", "mismatched"):
        others = found.captions_of(name)
        assert all(other != caption for other, caption in zip(others, matched, strict=False))
    # Again and again: each judge reads them anew.
    assert len(list(found.sets["real"])) == 3


def mean_colours(arrays):
    return np.asarray(arrays, dtype=np.float64).mean((1, 2))


def frechet(a, b):
    """The trace of (cov_a cov_b)^(1/2) is the sum of the singular values of A B^T, A and B centred and scaled."""
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + sum((x**2).sum() for x in centred) - 2 * overlap


def judge_of_redness(monkeypatch):
    """A judge that says red of the first two images of a set, and blue of all others."""

    def described(images):
        return np.array([[1.0] if place < 2 else [-1.0] for place, _ in enumerate(images)], dtype=np.float32)

    monkeypatch.setattr(descriptors, "describe", described)
    head = Head(("blue", "red"), torch.tensor([[-1.0, 1.0]]).double(), torch.zeros(2).double())
    return Judge({"data": "a test"}, {"colour": head}, mean=torch.zeros(1), scale=torch.ones(1))


def test_scores_on_other_features_stand_beside_those_that_are_there(tmp_path):
    def file_for(features, weights):
        protocol = SimpleNamespace(features=features, features_sha256=weights, resize="clean")
        file = scoring._scores_file(tmp_path, protocol)
        write_json(file, vars(protocol))
        return file.name

    large, small = "1" * 64, "2" * 64
    assert file_for("inception", large) == "scores.json"
    assert [file_for("dinov2", large) for _ in range(2)] == ["scores_dinov2_clean.json"] * 2
    # A network of another size, or trained otherwise, has the same name.
    assert [file_for("dinov2", small) for _ in range(2)] == ["scores_dinov2_clean_22222222.json"] * 2
    assert file_for("inception", small) == "scores_inception_clean.json"
    assert file_for("inception", large) == "scores.json"


def test_scores_of_the_same_weights_read_otherwise_have_their_own_file(tmp_path):
    protocol = SimpleNamespace(features="dinov2", features_sha256="1" * 64, resize="clean")
    names = []
    for preprocessing in ("a" * 64, "b" * 64, "c" * 64, "a" * 64, "c" * 64):
        file = scoring._scores_file(tmp_path, protocol, preprocessing=preprocessing)
        write_json(file, vars(protocol) | {"features_preprocessing_sha256": preprocessing})
        names.append(file.name)
    assert names[:2] == ["scores.json", "scores_dinov2_clean.json"] and len(set(names)) == 3
    assert names[3:] == [names[0], names[2]]


def test_a_score_that_measures_less_keeps_what_was_there(tmp_path, caplog):
    file = tmp_path / "scores.json"
    before = {"measures": ["fid", "hpsv3"], "rows": {"model": {}, "redrawn": {}}, "clip_sha256": "0"}
    write_json(file, before)
    less = SimpleNamespace(to_json=lambda: {"measures": ["fid"], "rows": {"model": {}}})
    scoring._keep_what_is_lost(file, less)
    assert json.loads((tmp_path / "scores.before.json").read_text()) == before
    assert "had clip_sha256, hpsv3, redrawn, which this score has not" in caplog.text
    # What was said to be kept stays when the same happens to a later score.
    later = {"measures": ["fid", "kid"], "rows": {"model": {}}}
    write_json(file, later)
    scoring._keep_what_is_lost(file, less)
    assert json.loads((tmp_path / "scores.before.json").read_text()) == before
    assert json.loads((tmp_path / "scores.before2.json").read_text()) == later
    write_json(file, before)
    (tmp_path / "scores.before.json").unlink()
    scoring._keep_what_is_lost(file, SimpleNamespace(to_json=lambda: before))
    assert not (tmp_path / "scores.before.json").exists()


def test_every_row_is_compared_with_its_own_reference(task, drawing, model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(measures, "LEAST_RESAMPLED", 5)
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
    for seed, row in enumerate(("model", "redrawn"), start=1):
        drawn[row] = [tmp_path / f"{row}-{name}.png" for name in NAMES]
        for path, array in zip(drawn[row], images(5, seed=seed), strict=True):
            Image.fromarray(array).save(path)
    # A caption is an axis. An image's cosine is 0.6 with its own caption and 0.4 with each other one.
    axes = torch.eye(5)
    monkeypatch.setattr(pairs, "embed_captions", lambda captions, clip: axes)
    monkeypatch.setattr(pairs, "embed_images", lambda arrays, clip: (0.4 + 0.2 * axes)[: len(list(arrays))])
    rulers = Rulers(extractor, Clip("a test", "none", None, None, None), judge=judge_of_redness(monkeypatch))
    scores = score(
        open_model(str(model_folder), needs_images=True),
        task,
        drawing=drawing,
        drawn=drawn,
        rulers=rulers,
        facts=DrawingFacts(processes=1, seconds_to_draw=0.0),
    ).to_json()
    # The stub's reference says no more of itself than that it is twelve images: its pixels are named too.
    assert scores["reference_pixels_sha256"] == images_of(images(12, seed=0)).sha256()
    assert scores["reference_pixels_sha256"] != images_of(images(12, seed=0)[::-1]).sha256()
    reference, made = mean_colours(images(12, seed=0)), mean_colours(images(5, seed=1))
    apart = [place for place in range(12) if place not in OWN_PLACES]
    wanted = {
        "model": frechet(made, reference),
        "redrawn": frechet(mean_colours(images(5, seed=2)), reference),
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
    assert scores["rows"]["mismatched"]["clip_score"] == pytest.approx(40)
    # Five images whose redness the stub judge reads: red, red, and three that are not.
    assert scores["judged"]["judge"]["model"] == {
        "accuracy": {"colour": 2 / 5},
        "n": {"colour": 5},
        "averaged": [],  # five captions are too few for the mean over attributes
    }
    assert scores["judge_pooled"] == scores["rows"]["model"]["judge_pooled"] == 2 / 5
    assert "judge_pooled" in scores["measures"] and "judge" not in scores
    # Ten captions would have an interval.
    assert "judge_pooled" not in scores["rows"]["model"]["intervals"]
    assert scores["judges"]["judge"]["sha256"] and scores["judges"]["judge"]["data"] == "a test"
    assert set(scores["rules"]) == {"fd_mean_colour", "kd_mean_colour", "mind_mean_colour"}
    low, high = scores["rows"]["model"]["intervals"]["fd_mean_colour"]
    assert low < scores["fd_mean_colour"] < high
