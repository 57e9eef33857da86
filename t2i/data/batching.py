"""How one optimizer step is split: sequences per step, micro-batches, and columns of padding that are cut off."""

import math

import torch
from torch import Tensor

from t2i.config import DataConfig
from t2i.errors import UserError
from t2i.tokens.sequence import IGNORED

POSITIONS = 8
"""The positions of a micro-batch are a multiple of this, because matrix products are faster then."""
COMPILED_POSITIONS = 32
"""Lengths of micro-batches are a multiple of this under train.compile, where each length is compiled. The paper's
layout has four such lengths. Otherwise a length costs nothing, and padding does."""


def global_batch(batch_tokens: int, *, seq_len: int, world_size: int) -> int:
    """Count the sequences of one step: batch_tokens / seq_len, rounded to a multiple of world_size.

    Args:
        batch_tokens: train.global_batch_tokens, over all ranks.
    """
    per_rank = round(batch_tokens / seq_len / world_size)
    return max(1, per_rank) * world_size


def num_text_sequences(config: DataConfig, *, global_batch: int, world_size: int) -> int:
    """Count the text-only sequences of a step, by data.replay_ratio.

    Raises:
        UserError: the ranks cannot share them evenly.
    """
    count = round(config.replay_ratio * global_batch)
    # Refused rather than rounded, because another ratio would be another experiment. Every step has the
    # same share, so that steps compare.
    if config.replay_ratio and (count == 0 or count == global_batch or count % world_size):
        raise UserError(
            f"data.replay_ratio is {config.replay_ratio}: {count} of a step's {global_batch} sequences, which does not"
            f" leave each of {world_size} ranks the same number of both kinds. Change it or train.global_batch_tokens."
        )
    return count


def accumulation(per_rank: int, *, micro_batch: int) -> tuple[int, int]:
    """Split a rank's sequences into the fewest micro-batches.

    Returns:
        the number of micro-batches, and the sequences of each (the last may have fewer).
    """
    steps = -(-per_rank // micro_batch)
    return steps, -(-per_rank // steps)


def micro_batches(
    input_ids: Tensor, labels: Tensor, *, size: int, multiple: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Split a step's sequences (B, S) into parts of `size`, grouped by length, without columns that are all padding.

    Lengths are rounded up to a `multiple`, S at most.

    The loss is the same: a step is a sum over its sequences, and no position attends to its right.
    """
    lengths = ((labels != IGNORED) * torch.arange(1, labels.shape[1] + 1)).amax(-1)  # (B,)
    # Sorted, not packed: a step's sum stays the same, no attention mask is needed, and at the paper's
    # layout 1% of the positions is padding, which packing would not repay.
    order = lengths.argsort(stable=True)
    parts = []
    for rows in order.split(size):
        # Rows times columns is what a matrix product sees, so it is this that must be a multiple of eight. Rounding
        # each width up instead would leave twice the padding at 320 positions per sequence.
        columns = math.lcm(multiple, POSITIONS // math.gcd(POSITIONS, len(rows)))
        longest = -(-max(1, int(lengths[rows].max())) // columns) * columns
        parts.append((input_ids[rows, :longest], labels[rows, :longest]))
    return parts
