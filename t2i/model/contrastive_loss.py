"""CLIP's loss over pairs of features: each finds its partner among all of the other kind."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCALE = 100.0
"""Largest inverse temperature, as in CLIP."""


def contrastive_loss(image: Tensor, text: Tensor, *, log_scale: Tensor) -> Tensor:
    """Compute CLIP's loss of features (N, D) of length one: images find their captions, captions their images."""
    logits = log_scale.exp() * image @ text.T  # (N, N): the pairs are on the diagonal
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
