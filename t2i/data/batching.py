"""How one optimizer step is cut: sequences per step, micro-batches, and padding that no position needs."""

import math

import torch
from torch import Tensor

from t2i.tokens.sequence import IGNORED

POSITIONS = 8
"""A micro-batch has a multiple of so many positions, which matrix products are quicker for."""


def global_batch(batch_tokens: int, *, seq_len: int, world_size: int) -> int:
    """Count the sequences of one step: batch_tokens / seq_len, rounded to what the ranks divide.

    Args:
        batch_tokens: train.global_batch_tokens, over all ranks.
    """
    per_rank = round(batch_tokens / seq_len / world_size)
    return max(1, per_rank) * world_size


def accumulation(per_rank: int, *, micro_batch: int) -> tuple[int, int]:
    """Split a rank's sequences into the fewest micro-batches: their number, and sequences each (the last has fewer)."""
    steps = -(-per_rank // micro_batch)
    return steps, -(-per_rank // steps)


def micro_batches(input_ids: Tensor, labels: Tensor, *, size: int) -> list[tuple[Tensor, Tensor]]:
    """Cut a step's sequences (B, S) into parts of `size`, like lengths together, without columns that none needs.

    A step is a sum over its sequences, and no position sees what is on its right: the losses are the same.
    """
    lengths = ((labels != IGNORED) * torch.arange(1, labels.shape[1] + 1)).amax(-1)  # (B,)
    order = lengths.argsort(stable=True)
    parts = []
    for rows in order.split(size):
        columns = POSITIONS // math.gcd(POSITIONS, len(rows))
        longest = -(-max(1, int(lengths[rows].max())) // columns) * columns
        parts.append((input_ids[rows, :longest], labels[rows, :longest]))
    return parts
