"""What all ranks know after the backward pass of a step: one reduction, one read from the device."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from t2i.tokens.vocab import KINDS


@dataclass(frozen=True)
class Read:
    """The same on every rank."""

    sums: Tensor
    """(7,) summed losses and counts of text, image, special, and z."""
    total: float
    """Tokens with a label."""
    computed: float
    """Positions of all micro-batches, padding among them."""
    is_finite: bool
    should_stop: bool
    should_save: bool


def read_step(sums: Tensor, counts: Tensor, *, should_stop: bool, should_save: bool) -> Read:
    """Sum over ranks and read, once a step: losses, counts, tokens, and what any rank found or was asked.

    It comes before the update, which it may forbid, so the device waits here for the time of one small reduction.

    Args:
        sums: (7,) this rank's summed losses and counts.
        counts: (2,) tokens and positions, of all ranks already.
        should_stop: this rank was asked to stop; one is enough.
        should_save: this rank was asked to save; one is enough.
    """
    flags = torch.tensor([should_stop, should_save], dtype=torch.float64, device=sums.device)
    is_broken = (~torch.isfinite(sums).all()).double()[None]
    values = torch.cat([sums.double(), is_broken, flags])
    dist.all_reduce(values)
    host = torch.cat([values, counts]).cpu()
    broken, stop, save, tokens, computed = host[7:].tolist()
    return Read(host[:7], tokens, computed, not broken, should_stop=stop > 0, should_save=save > 0)


def loss_row(sums: Tensor) -> dict[str, Any]:
    """Divide summed losses and counts (7,) once: nats a token by class, None where nothing was counted."""
    totals, counts = sums[:3], sums[3:6]
    row: dict[str, Any] = {"loss": number((totals.sum() / counts.sum()).item())}
    for kind, total, count in zip(KINDS, totals, counts, strict=True):
        row[f"{kind}_loss"] = number((total / count).item()) if count else None
        row[f"{kind}_tokens"] = int(count)
    return row


def number(value: float) -> float | None:
    """JSON has no nan or inf: a value that is not finite is stored as null."""
    return value if math.isfinite(value) else None
