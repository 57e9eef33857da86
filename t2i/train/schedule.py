"""The learning rate of each step."""

import math

from t2i.config import TrainConfig


def learning_rate(step: int, *, config: TrainConfig) -> float:
    """Compute the learning rate: linear warm-up, then a cosine to min_lr_ratio of the peak (paper sec. 2.1).

    Args:
        step: optimizer steps done, from 0.
    """
    if step < config.warmup_steps:
        # step + 1: a learning rate of 0 would waste the first step.
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    # At most 1: a run resumed with a smaller max_steps must not climb up the cosine again.
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
