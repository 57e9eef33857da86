"""The page of classes is what the table found, and what passed there passes again."""

import json

import pytest
import transformers
from backbones.page import PAGE, PASSES, PEOPLE_USE, page, read_results, results_file
from backbones.table import tried
from made_shards import make_shards

FILE = results_file(transformers.__version__)
ROWS = json.loads(FILE.read_text())["rows"]


def test_the_page_is_made_from_the_results():
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("found", read_results(), ids=lambda found: found["transformers"])
def test_of_the_classes_that_were_tried_at_least_85_in_100_pass(found):
    results = [row["result"] for row in found["rows"].values()]
    assert results.count(PASSES) >= 0.85 * len(results) and results.count("fails") == 0
    used = {name: found["rows"][kind]["result"] for name, kind in PEOPLE_USE.items()}
    assert set(used.values()) == {PASSES}, used


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("small"), num_images=24, image_size=32)


@pytest.mark.backbones
@pytest.mark.parametrize("model_type", [name for name, row in ROWS.items() if row["result"] == PASSES])
def test_a_class_that_passed_passes_again(model_type, small_shards):
    found = tried(model_type, shards=small_shards)
    assert found.result == PASSES, found
