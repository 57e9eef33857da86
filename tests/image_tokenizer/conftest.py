"""What tests of image tokenizers share."""

import pytest
import torch

from t2i.image_tokenizer import train as image_tokenizer


@pytest.fixture
def few_latents(monkeypatch):
    """Make the first codebook from few latents, so that a training of a few images begins at once."""
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)
    torch.set_num_threads(1)
