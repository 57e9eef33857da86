"""What the exact judge looks at: colours in places, how much there is of each, and directions of edges.

No network, and not the features that distances are taken on: a model cannot be tuned to both at once, and 4,000 images
take seconds.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from t2i.measure.images import batches, read_image

SIDE = 64
"""Pixels per side that the judge looks at."""
GRID = 16
"""Mean colours per side."""
LEVELS = 4
"""Steps per channel of the colour histogram."""
CELLS, ANGLES = 8, 8
"""Cells per side, and directions of edges in each."""
BATCH = 256


def describe(images: Iterable[np.ndarray | Path]) -> np.ndarray:
    """Describe files or uint8 images (H, W, 3): (N, F) float32."""
    found = []
    for batch in batches(images, size=BATCH):
        pixels = np.stack([_at_side(image) for image in batch]).astype(np.float32) / 255  # (B, 64, 64, 3)
        found.append(np.concatenate([_grid(pixels), _histogram(pixels), _edges(pixels)], axis=1))
    return np.concatenate(found).astype(np.float32)


def _at_side(image: np.ndarray | Path) -> np.ndarray:
    opened = read_image(image) if isinstance(image, Path) else Image.fromarray(image)
    if opened.size != (SIDE, SIDE):
        opened = opened.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(opened)


def _grid(pixels: np.ndarray) -> np.ndarray:
    """Average the colours of GRID x GRID places: (B, GRID^2 3)."""
    step = SIDE // GRID
    places = pixels.reshape(-1, GRID, step, GRID, step, 3).mean((2, 4))
    return places.reshape(len(pixels), -1)


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """Count colours in the whole image and in its quarters: roots of shares, (B, 5 LEVELS^3)."""
    steps = np.minimum((pixels * LEVELS).astype(int), LEVELS - 1)  # (B, 64, 64, 3)
    bins = (steps * LEVELS ** np.arange(3)).sum(-1)
    half = SIDE // 2
    parts = [bins] + [bins[:, y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
    shares = [
        np.stack([(part == colour).mean((1, 2)) for colour in range(LEVELS**3)], axis=1) for part in parts
    ]
    # Roots: a small patch of a rare colour, such as a face, says more than its share of the area.
    return np.sqrt(np.concatenate(shares, axis=1))


def _edges(pixels: np.ndarray) -> np.ndarray:
    """Count directions of edges by cell, each cell of length 1: (B, CELLS^2 ANGLES)."""
    grey = pixels.mean(-1)
    down, right = np.gradient(grey, axis=(1, 2))
    strength = np.hypot(down, right)
    angle = np.minimum((np.arctan2(down, right) % np.pi / np.pi * ANGLES).astype(int), ANGLES - 1)
    step = SIDE // CELLS
    found = np.stack([np.where(angle == each, strength, 0) for each in range(ANGLES)], axis=-1)
    cells = found.reshape(-1, CELLS, step, CELLS, step, ANGLES).sum((2, 4))
    # A flat cell stays near zero instead of becoming noise of length 1.
    return (cells / (np.linalg.norm(cells, axis=-1, keepdims=True) + 1)).reshape(len(pixels), -1)
