"""What tests of image tokenizers share."""

import pytest
import torch
from PIL import Image

from t2i.image_tokenizer import train as image_tokenizer


@pytest.fixture
def few_latents(monkeypatch):
    """Make the first codebook from few latents, so that a training of a few images begins at once."""
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    """Forty images, of which a share of 2% holds out none or one."""
    (tmp_path / "images").mkdir()
    for index in range(40):
        Image.new("RGB", (16, 16), (6 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "images" / f"{index}.txt").write_text(f"number {index}")
    return str(tmp_path / "images")
