"""Embeddings of image codes from the codebook's vectors, and from captions of the images that have them."""

import math

import pytest
import torch

from t2i.errors import DataError
from t2i.model.code_embeddings import FEW_IMAGES, deviations_by_captions, deviations_by_vectors


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(24, 24, generator=generator) * torch.linspace(0.1, 2, 24)
    return torch.randn(2_000, 24, generator=generator) @ mixed + torch.linspace(-3, 3, 24)


def by_vectors(text, vectors, seed=0):
    return deviations_by_vectors(text, vectors, generator=torch.Generator().manual_seed(seed))


def test_codes_lie_around_the_mean_as_text_does(text):
    # Of as many axes as text has, and more: fewer could not fill its directions in one draw.
    vectors = torch.randn(4_000, 256, generator=torch.Generator().manual_seed(1)) * 0.003 + 0.1
    found = by_vectors(text, vectors)
    assert found.mean(0).abs().max() < 1e-3
    wanted, covariance = torch.cov(text.T), torch.cov(found.T)
    # One draw of 256 axes: each entry is off by about a sixteenth of the largest.
    assert (covariance - wanted).abs().max() < 0.25 * wanted.abs().max()


def test_neighbours_in_the_codebook_are_neighbours_in_the_model(text):
    vectors = torch.randn(300, 4, generator=torch.Generator().manual_seed(2))
    found = by_vectors(text, vectors)
    near, far = torch.cdist(vectors, vectors), torch.cdist(found, found)
    pairs = torch.triu_indices(300, 300, 1)
    assert torch.corrcoef(torch.stack([near[*pairs], far[*pairs]]))[0, 1] > 0.7
    # Linear: the code halfway between two is halfway.
    middle = by_vectors(text, torch.cat([vectors[:2], vectors[:2].mean(0, keepdim=True)]))
    torch.testing.assert_close(middle[2], middle[:2].mean(0))
    assert torch.equal(found, by_vectors(text, vectors))
    assert not torch.equal(found, by_vectors(text, vectors, seed=1))


def test_a_codebook_that_is_one_vector_is_refused(text):
    with pytest.raises(DataError, match="the 5 vectors of the image tokenizer's codebook are alike"):
        by_vectors(text, torch.ones(5, 4))


CAPTIONS = [torch.tensor(ids, dtype=torch.long) for ids in ([3, 7], [3, 8, 8], [3, 7, 9], [])]
CODES = torch.tensor([[0, 0, 1], [1, 2, 2], [0, 1, 4], [1, 1, 4]])


def slow_twin(text):
    """The same sums, image by image and code by code."""
    centred = (text - text.mean(0)).double()
    kept = {token: sum(token in ids.tolist() for ids in CAPTIONS) for token in (3, 7, 8, 9)}
    weight = {token: math.log(4 / count) for token, count in kept.items()}
    said = []
    for ids in CAPTIONS:
        held = set(ids.tolist())
        total = sum(weight[token] for token in held)
        said.append(sum(weight[token] * centred[token] for token in held) / total if held else None)
    mean = sum(one for one in said if one is not None) / 3
    rows = []
    for code in range(5):
        places = [image for image in range(4) for other in CODES[image].tolist() if other == code]
        images = len(set(places))
        parts = [said[image] - mean for image in places if said[image] is not None]
        total = sum(parts) if parts else torch.zeros(text.shape[1], dtype=torch.float64)
        rows.append(total / max(len(places), 1) * images / (images + FEW_IMAGES))
    found = torch.stack(rows)
    return found * (centred.square().sum(1).mean() / found.square().sum(1).mean()).sqrt()


def test_a_code_is_what_captions_of_its_images_say_beyond_others(text):
    found = deviations_by_captions(text, captions=CAPTIONS, codes=CODES, codebook_size=5)
    torch.testing.assert_close(found.double(), slow_twin(text), atol=1e-4, rtol=1e-4)
    assert found[3].eq(0).all()  # no image has it
    assert found[1].norm() < found[0].norm()  # every image has code 1, so it says least


def test_captions_that_are_all_alike_are_refused(text):
    with pytest.raises(DataError, match="4 captions were looked at, and none says anything"):
        deviations_by_captions(text, captions=[torch.tensor([3, 7])] * 4, codes=CODES, codebook_size=5)
