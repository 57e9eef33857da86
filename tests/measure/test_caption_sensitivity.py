"""Caption sensitivity of splits with few images, and how scores.json keeps it and is compared."""

from dataclasses import replace
from pathlib import Path

import pytest

from t2i.data.shards.reader import read_split
from t2i.errors import UserError
from t2i.measure.compare import check_protocols, read_scores
from t2i.measure.heldout import CaptionMeter, caption_meter
from t2i.measure.perplexity import data_of
from t2i.measure.protocol import DrawingFacts
from t2i.runs.loading import open_model

OLD_SCORES = (
    Path(__file__).parents[1]
    / "fixtures"
    / "written_by_0_1_0"
    / "run"
    / "eval"
    / "step_000004"
    / "scores.json"
)


@pytest.fixture(scope="module")
def model(finished):
    return open_model(str(finished.run_dir), needs_images=False)


@pytest.fixture(scope="module")
def samples(finished):
    return list(read_split(finished.data.shards, "heldout", num_samples=1))


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


def test_images_of_one_caption_have_no_shuffled_one(measure, model):
    config = data_of(model, shards=None, mode=None)
    both = list(read_split(config.shards, "heldout", num_samples=2))
    both[1]["caption_ids"] = both[0]["caption_ids"]
    alike = measure(both)
    assert (alike.num_pictures, alike.wrong) == (2, None)


def test_no_image_has_no_loss(measure):
    assert measure([]) == CaptionMeter(num_pictures=0, own=None, wrong=None, empty=None, text=None)


def test_scores_that_version_0_1_wrote_compare_with_those_of_the_same_protocol_in_todays_words():
    old = read_scores(OLD_SCORES)
    source = str(old.entries["data"]).split(",")[0]
    words = {
        "data": f"{source}, held-out images",
        "reference": f"{old.entries['n']} held-out images of {source}",
    }
    assert all(old.entries[key] != text for key, text in words.items())
    new = replace(old, entries={**old.entries, **words})
    check_protocols(old, new)
    other = replace(new, entries={**new.entries, "reference": "images of the moon"})
    with pytest.raises(UserError, match=r"different protocols:\nreference: .* \| images of the moon$"):
        check_protocols(old, other)
