"""Settings and images of image tokenizers that train in a second, and how such a training is disturbed."""

import numpy as np

from t2i.config import TokenizerConfig
from t2i.image_tokenizer import train

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


class Killed(Exception):
    """Ends a training without a chance to save."""


def kill():
    raise Killed


def at_step(monkeypatch, number, act):
    """Call `act` as the step of this number begins; return a list that grows by one with each step."""
    step_loss, calls = train._step_loss, []

    def counted(*args):
        calls.append(1)
        if len(calls) == number:
            act()
        return step_loss(*args)

    monkeypatch.setattr(train, "_step_loss", counted)
    return calls
