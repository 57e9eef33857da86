"""Held-out pictures cut in two: no picture on both sides, and none that cannot be read."""

import re

import pytest
from measure.conftest import write_coco
from PIL import Image

from t2i.commands.score import ScoreCommand, manifest_of, task_of
from t2i.data.shards.manifest import read_manifest
from t2i.data.sources import open_source, reopen_source
from t2i.errors import DataError, UserError
from t2i.measure.heldout_images import caption_meters, heldout_halves
from t2i.runs.loading import open_model


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
    for count in (9, 15, 5_000):
        sentence = rf"^--num-samples is {count:,}; expected 10 to 14, half of the 29 held-out images of coco:"
        with pytest.raises(UserError, match=sentence):
            heldout_halves(source, num_samples=count)


def made_folder(folder, *, count):
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"number {index}")
    return str(folder)


@pytest.mark.parametrize("count", [23, 60, 200])
def test_too_few_held_out_images_are_a_sentence_with_a_share_that_suffices(tmp_path, count):
    name = made_folder(tmp_path / "images", count=count)
    with pytest.raises(DataError) as refusal:
        heldout_halves(open_source(name, heldout_share=0.02), num_samples=None)
    assert "held-out images; a distance needs at least 20." in str(refusal.value)
    share = float(re.search(r"`--heldout-share ([\d.]+)`", str(refusal.value))[1])
    halves = heldout_halves(open_source(name, heldout_share=share), num_samples=None)
    assert 10 <= len(halves.drawn) <= 16  # enough, and not most of the images


def test_a_folder_of_too_few_images_in_all_says_so(tmp_path):
    source = open_source(made_folder(tmp_path / "images", count=20), heldout_share=0.5)
    with pytest.raises(DataError, match="It has 20 images in all, which is too few to hold so many out"):
        heldout_halves(source, num_samples=None)


def test_shards_of_another_image_size_are_measured_at_the_models(model_folder, shards, capsys):
    opened = open_model(
        str(model_folder), needs_images=True
    )  # it draws 32 pixels per side; the shards have 64
    command = ScoreCommand(str(model_folder), heldout_shards=shards)
    assert task_of(command, opened).reference.image_size == opened.image_size() == 32
    meters = caption_meters(opened, manifest_of(command, opened))
    assert meters["heldout"].own is not None
    assert "captions heard, heldout: 100%" in capsys.readouterr().err


def test_the_other_half_is_drawn_and_compared_with_the_one_that_is_drawn_otherwise(model_folder, shards):
    opened = open_model(str(model_folder), needs_images=True)
    one, other = (
        task_of(ScoreCommand(str(model_folder), heldout_shards=shards, other_half=swapped), opened)
        for swapped in (False, True)
    )
    halves = heldout_halves(reopen_source(read_manifest(shards)), num_samples=None)
    assert one.reference.which["keys"] == [pair.key for pair in halves.reference]
    assert other.reference.which["keys"] == [pair.key for pair in halves.drawn]
    assert list(one.captions.values()) == [pair.caption for pair in halves.drawn]
    assert list(other.captions.values()) == [pair.caption for pair in halves.reference]
    assert other.captions_rule == f"{one.captions_rule}, the other half"
