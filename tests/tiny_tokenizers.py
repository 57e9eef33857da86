"""Settings and images of image tokenizers that train in a second."""

import numpy as np

from t2i.config import TokenizerConfig

TINY = TokenizerConfig(
    image_size=16,
    channels=(32, 32),
    codebook_size=8,
    max_steps=20,
    batch_size=4,
    save_every=10,
    revive_every=5,
)


def squares(count=24):
    rng = np.random.default_rng(0)
    return np.broadcast_to(rng.integers(0, 255, (count, 1, 1, 3), dtype=np.uint8), (count, 16, 16, 3)).copy()
