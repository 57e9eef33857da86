"""Held-out pictures cut in two: no picture on both sides, and none that cannot be read."""

import pytest
from measure.conftest import write_coco

from t2i.data.sources import open_source
from t2i.errors import DataError
from t2i.measure.heldout_images import heldout_halves


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Of thirty pictures with five captions each, one of them broken."""
    coco = write_coco(tmp_path_factory.mktemp("halves") / "coco", num_pictures=30)
    file = sorted((coco / "val2014").iterdir())[7]
    file.write_bytes(file.read_bytes()[:300])
    return open_source(f"coco:{coco}", heldout_share=0.9999)


def test_an_image_of_many_captions_is_in_one_half_and_a_broken_one_in_none(source):
    halves = heldout_halves(source, num_samples=None)
    assert (len(halves.reference), len(halves.drawn)) == (14, 14)
    pairs = [*halves.reference, *halves.drawn]
    assert len({pair.group for pair in pairs}) == 28
    for pair in pairs:
        pair.open()


def test_fewer_images_are_the_first_of_more(source):
    drawn = heldout_halves(source, num_samples=12).drawn
    assert drawn == heldout_halves(source, num_samples=None).drawn[:12]
    with pytest.raises(DataError, match=r"gives 18 held-out images; a distance needs at least 20"):
        heldout_halves(source, num_samples=9)
