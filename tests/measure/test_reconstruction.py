"""How good an image tokenizer is, against formulas written out."""

import numpy as np
import pytest
import torch

from t2i.config import ASSETS
from t2i.image_tokenizer.quality import evaluate_tokenizer, structural_similarity
from t2i.measure.features import load_features
from t2i.tokens.image import ImageTokenizer


def test_measures_of_a_round_trip_equal_their_formulas(capsys):
    tokenizer = ImageTokenizer.load(ASSETS / "image_tokenizer")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    images[0] = 90  # one that is easy
    extractor = load_features("efficientnet_lite0")
    found, back = evaluate_tokenizer(tokenizer, images, extractor=extractor, batch_size=2)
    assert "reconstruct: 100%" in capsys.readouterr().err
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = tokenizer.encode(pixels)
    errors = [((a.astype(float) - b.astype(float)) ** 2).mean() for a, b in zip(images, back, strict=True)]
    assert found.psnr == pytest.approx(np.mean([10 * np.log10(255**2 / error) for error in errors]), rel=1e-5)
    assert found.codes_in_use == len(set(codes.flatten().tolist())) / tokenizer.codebook_size
    assert (found.num_pictures, back.shape) == (3, images.shape)
    decoded = (tokenizer.decode(codes) + 1) * 127.5
    assert (
        np.abs(back - decoded.permute(0, 2, 3, 1).clamp(0, 255).numpy()).max() <= 0.51
    )  # rounded, in batches


def test_structural_similarity_equals_a_walk_over_windows():
    first, second = np.random.default_rng(0).integers(0, 256, (2, 13, 14, 3), dtype=np.uint8)
    x, y = (image.astype(float) @ [0.299, 0.587, 0.114] for image in (first, second))
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for top in range(3):
        for left in range(4):
            a, b = (one[top : top + 11, left : left + 11] for one in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * cov + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )  # fmt: skip
    found = structural_similarity(torch.from_numpy(first[None]), torch.from_numpy(second[None]))
    assert found.tolist() == pytest.approx([np.mean(values)], abs=1e-5)  # fp32 differences of squares
