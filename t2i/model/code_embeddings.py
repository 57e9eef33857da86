"""Where the embeddings of image codes begin, by what is known of the codes: their vectors, or captions of their images.

Both functions return deviations (codebook, D) from the mean of the text embeddings, about as long as those of text.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from t2i.errors import DataError

FEW_IMAGES = 10
"""A code that so many images have is moved half as far as one that many have: chance alone moves rare codes."""


def deviations_by_vectors(text_rows: Tensor, vectors: Tensor, *, generator: torch.Generator) -> Tensor:
    """Map code vectors (codebook, C) linearly to deviations (codebook, D) with the covariance of text embeddings.

    Each axis of the codebook becomes a random mixture of text embeddings. Codes that are neighbours for the image
    tokenizer, by its own distance, are then neighbours for the language model.

    Args:
        text_rows: (V, D) embeddings of text.

    Raises:
        DataError: the vectors are all alike.
    """
    text, codes = _centred(text_rows), _centred(vectors)
    length = codes.square().sum(1).mean().sqrt()
    if not length > 0:
        raise DataError(f"the {len(vectors)} vectors of the image tokenizer's codebook are alike.")
    # Not whitened: the image tokenizer chooses codes by the plain distance, which this map keeps up to a factor.
    mixtures = torch.randn(codes.shape[1], len(text), generator=generator) / len(text) ** 0.5  # (C, V)
    return (codes / length) @ (mixtures @ text)  # (codebook, D)


def deviations_by_captions(
    text_rows: Tensor, *, captions: Sequence[Tensor], codes: Tensor, codebook_size: int
) -> Tensor:
    """Average for each code what the captions of its images say, beyond what all captions say: (codebook, D).

    A caption is the mean of its tokens' embeddings, where a token counts by how few captions have it. A code is the
    mean over all its places in all images. It stays near zero where few images have it, or where all have it.

    Args:
        text_rows: (V, D) embeddings of text.
        captions: ids (T,) of N captions.
        codes: (N, K) codes of their images.

    Raises:
        DataError: no caption differs from another.
    """
    said = _captions(_centred(text_rows), captions)  # (N, D)
    if not said.abs().max() > 0:
        raise DataError(
            f"{len(captions)} captions were looked at, and none says anything that others do not."
        )
    images, places = np.arange(len(codes)).repeat(codes.shape[1]), codes.flatten().numpy()
    # Counts that stand at one place of a sparse matrix are added.
    counts = csr_matrix((np.ones(len(places), np.float32), (places, images)), (codebook_size, len(codes)))
    num_places = np.asarray(counts.sum(1))  # (codebook, 1)
    num_images = np.diff(counts.indptr)[:, None]  # (codebook, 1)
    means = (counts @ said.numpy()) / np.maximum(num_places, 1)  # (codebook, D)
    found = torch.from_numpy(means * (num_images / (num_images + FEW_IMAGES))).float()
    # One factor for all: a code of which little is known stays nearer to the mean than others.
    return found * (_length(_centred(text_rows)) / _length(found))


def _captions(text: Tensor, captions: Sequence[Tensor]) -> Tensor:
    """Return features (N, D) of captions, around their mean; zero where a caption is empty."""
    held = [ids.unique() for ids in captions]
    frequency = torch.cat(held).bincount(minlength=len(text)).clamp(min=1)  # (V,) captions with each token
    weights = (len(captions) / frequency).log()
    sums = torch.stack([weights[ids] @ text[ids] for ids in held])  # (N, D)
    totals = torch.stack([weights[ids].sum() for ids in held])
    means = sums / totals.clamp(min=1e-6)[:, None]
    is_known = totals > 0
    means[is_known] -= means[is_known].mean(0)
    return means


def _centred(rows: Tensor) -> Tensor:
    return rows.float() - rows.float().mean(0)


def _length(rows: Tensor) -> Tensor:
    return rows.square().sum(1).mean().sqrt()
