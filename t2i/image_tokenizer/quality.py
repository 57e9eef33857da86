"""Quality of an image tokenizer: its reconstructions, and how much of its codebook it uses."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from t2i.measure.distances import frechet_distance, statistics
from t2i.measure.extractor import FeatureExtractor
from t2i.measure.features import extract
from t2i.tokens.image import ImageTokenizer, images_of, pixels_of

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


@dataclass(frozen=True)
class Reconstruction:
    """Measures of a tokenizer's reconstructions, averaged over images."""

    num_pictures: int
    psnr: float
    """Peak signal-to-noise ratio in decibels, on uint8 images."""
    ssim: float
    """Structural similarity of grey values, with an 11 x 11 Gaussian window.

    Source: Wang et al. 2004, Image quality assessment.
    """
    codes_in_use: float
    """Share of the codebook that is used at least once."""
    distance: float
    """Frechet distance between reconstructions and images, on the extractor's features."""


def evaluate_tokenizer(
    tokenizer: ImageTokenizer, images: np.ndarray, *, extractor: FeatureExtractor, batch_size: int = 32
) -> tuple[Reconstruction, np.ndarray]:
    """Encode and decode uint8 images (N, H, W, 3); return the measures and the reconstructions."""
    codes, back, psnr, ssim = [], [], [], []
    for start in tqdm(range(0, len(images), batch_size), desc="reconstruct", unit="batch"):
        batch = torch.from_numpy(images[start : start + batch_size])
        codes.append(tokenizer.encode(pixels_of(batch)))
        decoded = images_of(tokenizer.decode(codes[-1])).cpu()
        # Clamped, because an image that comes back unchanged would have an infinite ratio.
        error = (decoded.float() - batch.float()).square().flatten(1).mean(1).clamp(min=1e-4)  # (B,)
        psnr.append(10 * (255**2 / error).log10())
        ssim.append(structural_similarity(decoded, batch))
        back.append(decoded.numpy())
    reconstructed = np.concatenate(back)
    real, made = (
        statistics(extract(side, extractor, batch_size=batch_size, progress=True))
        for side in (images, reconstructed)
    )
    measures = Reconstruction(
        num_pictures=len(images),
        psnr=float(torch.cat(psnr).mean()),
        ssim=float(torch.cat(ssim).mean()),
        codes_in_use=torch.cat(codes).unique().numel() / tokenizer.codebook_size,
        distance=frechet_distance(made, real),
    )
    return measures, reconstructed


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Compare uint8 images (B, H, W, 3) by their grey values: (B,), where 1 means equal."""
    # Luma weights of ITU-R BT.601.
    weights = torch.tensor([0.299, 0.587, 0.114])
    x, y = ((image.float() @ weights)[:, None] for image in (first, second))  # (B, 1, H, W)
    offsets = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    line = torch.exp(-(offsets.float() ** 2) / (2 * SSIM_SIGMA**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    var_x = F.conv2d(x * x, window) - mean_x**2
    var_y = F.conv2d(y * y, window) - mean_y**2
    cov = F.conv2d(x * y, window) - mean_x * mean_y
    # The paper's constants, which keep the ratio finite where an image is flat.
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (ratio / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)
