"""Captions of other images: never another caption of the same one, nor the same words."""

import itertools

import numpy as np
import pytest

from t2i.measure.shuffled import unrelated


def test_where_nothing_repeats_each_takes_the_one_so_many_places_further():
    assert unrelated("abcde", range(5), shift=2) == [2, 3, 4, 0, 1]


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_no_image_is_given_another_caption_of_itself_or_the_same_words(shift):
    # Three captions of each image side by side, as in a list that names images one after the other.
    images = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    texts = ["a cat", "a pet", "fur", "a dog", "a pet", "paws", "a car", "fur", "wheels"]
    places = unrelated(texts, images, shift=shift)
    for place, other in enumerate(places):
        assert texts[other] != texts[place] and images[other] != images[place]


def test_every_small_case_agrees_with_all_that_could_be_chosen():
    for count in range(5):
        for texts in itertools.product("ab", repeat=count):
            for images in itertools.product(range(2), repeat=count):
                fitting = [
                    {b for b in range(count) if texts[a] != texts[b] and images[a] != images[b]}
                    for a in range(count)
                ]
                places = unrelated(texts, images, shift=count // 2)
                if all(fitting):
                    assert all(place in those for place, those in zip(places, fitting, strict=True))
                else:
                    assert places is None


def test_a_caption_that_all_share_has_no_other():
    assert unrelated(["a photo"] * 20, range(20), shift=10) is None
    assert unrelated(["alone"], [0], shift=0) is None
    assert unrelated([], [], shift=0) == []


def test_thousands_of_captions_that_repeat_are_paired_at_once():
    texts = np.random.default_rng(0).integers(0, 9, 5_000).tolist()
    places = unrelated(texts, shift=2_500)
    assert not any(texts[a] == texts[b] for a, b in enumerate(places))


def test_a_shuffled_caption_is_of_the_same_style_where_that_is_told():
    texts, styles = ["a", "b", "c", "d", "e", "f"], ["x", "y", "x", "y", "x", "y"]
    places = unrelated(texts, shift=3, alike=styles)
    assert [styles[place] for place in places] == styles
    assert all(texts[place] != texts[at] for at, place in enumerate(places))
    assert unrelated(["a", "b"], shift=1, alike=["x", "y"]) is None
