"""Caption sensitivity: shuffled captions are always another image's, and one image alone has none."""

import pytest
import torch

from t2i.data.shards.reader import read_split
from t2i.measure.compare import ReadScores, check_protocols
from t2i.measure.heldout import CaptionMeter, caption_meter, with_ids
from t2i.measure.perplexity import data_of
from t2i.measure.protocol import DrawingFacts
from t2i.runs.loading import open_model


@pytest.fixture(scope="module")
def model(finished):
    return open_model(str(finished.run_dir), needs_images=False)


@pytest.fixture(scope="module")
def samples(finished):
    return list(read_split(finished.data.shards, "heldout", num_samples=3))


@pytest.fixture(scope="module")
def measure(model):
    config = data_of(model, shards=None, mode=None)
    return lambda samples: caption_meter(
        model.model, samples, config=config, layout=model.layout, batch_size=2
    )


def test_one_image_has_no_shuffled_caption_to_be_measured_under(measure, samples):
    alone = measure(samples[:1])
    assert (alone.num_pictures, alone.wrong) == (1, None)
    assert alone.own > 0 and alone.empty > 0 and alone.text > 0
    facts = DrawingFacts(processes=1, seconds_to_draw=1.0, captions_heard={"heldout": alone}).to_json()
    assert facts["captions_heard"]["heldout"]["wrong"] is None


def test_no_image_has_no_loss(measure):
    assert measure([]) == CaptionMeter(num_pictures=0, own=None, wrong=None, empty=None, text=None)


@pytest.mark.parametrize("count", [2, 3])
def test_every_image_is_shuffled_to_the_caption_of_another(measure, samples, count):
    ids = [torch.from_numpy(sample["caption_ids"].astype("int64")) for sample in samples[:count]]
    found = measure(samples[:count])
    shuffled = [with_ids(sample, ids[(place + 1) % count]) for place, sample in enumerate(samples[:count])]
    # float32 losses of single sequences, padded to other lengths than in a batch.
    assert found.wrong == pytest.approx(measure(shuffled).own, abs=1e-5)
    assert abs(found.wrong - found.own) > 1e-4


def test_scores_in_the_words_of_version_0_1_still_compare():
    entries = {"data": "x, held-out {}s", "reference": "8 held-out {}s of x", "captions": "by {} id", "n": 8}
    old, new = (
        ReadScores([], rows={}, entries={key: str(value).format(word) for key, value in entries.items()})
        for word in ("picture", "image")
    )
    check_protocols(old, new)
    with pytest.raises(ValueError, match=r"different protocols:\nreference: 8 held-out images of x \| of y$"):
        check_protocols(old, ReadScores([], rows={}, entries={**new.entries, "reference": "of y"}))
