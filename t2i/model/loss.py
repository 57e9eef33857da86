"""Cross-entropy apart for text, image and special tokens, as (sum, count), in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_ROWS = 256
"""Positions whose logits exist at one time."""


def token_losses(hidden: Tensor, labels: Tensor, *, head: Tensor) -> tuple[Tensor, Tensor]:
    """Compute each position's cross-entropy and squared log-partition over all rows of the head.

    Logits are made and reduced in fp32, chunk by chunk, and made again in the backward pass, so that memory grows
    with CHUNK_ROWS and not with the batch. Positions that are not counted cost nothing.

    Args:
        hidden: (B, S, D) last hidden states.
        labels: (B, S) next-token ids; -100 is not counted.
        head: (V, D) output weights.

    Returns:
        losses in nats and squared log-partitions, (B, S) fp32 each, exactly 0 where not counted.
    """
    counted = labels != IGNORED
    rows, targets = hidden[counted], labels[counted]  # (N, D), (N,)
    chunks = [
        checkpoint(_chunk_losses, row, target, head, use_reentrant=False)
        for row, target in zip(rows.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
    ]
    losses = torch.cat([loss for loss, _ in chunks])
    partitions = torch.cat([partition for _, partition in chunks])
    zeros = hidden.new_zeros(labels.shape, dtype=torch.float32)
    return zeros.masked_scatter(counted, losses), zeros.masked_scatter(counted, partitions)


def split_sums(
    losses: Tensor, labels: Tensor, *, num_text_rows: int, first_image_id: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum losses (B, S) apart by the class of the label.

    Returns:
        for text, image and special: the sum in nats and the number of tokens counted.

    Source: paper sec. 2.2, Figure 4.
    """
    is_text = (labels >= 0) & (labels < num_text_rows)
    is_image = labels >= first_image_id
    is_special = (labels >= num_text_rows) & ~is_image
    kinds = {"text": is_text, "image": is_image, "special": is_special}
    return {kind: (losses.where(mask, 0).sum(), mask.sum()) for kind, mask in kinds.items()}


def _chunk_losses(hidden: Tensor, targets: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden, head.to(hidden.dtype)).float()  # (N, V)
    partition = logits.logsumexp(-1)
    return partition - logits.gather(1, targets[:, None])[:, 0], partition.square()
