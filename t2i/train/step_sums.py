"""What all ranks know after the backward pass of a step: one reduction, one read from the device."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from t2i.model.loss import NUM_SUMS, LossSums


@dataclass(frozen=True)
class Read:
    """The same on every rank."""

    sums: LossSums
    """On the CPU, in fp64."""
    positions: int
    """Of all micro-batches, padding included."""
    is_finite: bool
    should_stop: bool
    should_save: bool

    @property
    def tokens(self) -> int:
        """Count the tokens with a label."""
        return int(self.sums.tokens())


def tokens_of_all(labels: Tensor, *, device: torch.device) -> Tensor:
    """Count the labels (B, S) of all ranks as an fp64 tensor () on the device, which nobody waits for."""
    tokens = (labels >= 0).sum(dtype=torch.float64).to(device)
    dist.all_reduce(tokens)
    return tokens


def read_step(sums: LossSums, *, positions: int, should_stop: bool, should_save: bool) -> Read:
    """Sum over ranks and read, once per step: losses, counts, and what any rank found or was asked.

    It comes before the update, which it may forbid, so the device waits here for the time of one small reduction.

    Args:
        sums: of this rank's micro-batches.
        positions: of this rank's micro-batches, padding included.
        should_stop: this rank was asked to stop; one is enough.
        should_save: this rank was asked to save; one is enough.
    """
    packed = sums.pack()
    # A rank's own test: sums of ranks could overflow, or be finite where one rank's were not.
    is_broken = (~torch.isfinite(packed).all()).double()[None]
    told = torch.tensor([positions, should_stop, should_save], dtype=torch.float64, device=packed.device)
    values = torch.cat([packed, is_broken, told])  # (NUM_SUMS + 4,)
    dist.all_reduce(values)
    host = values.cpu()
    broken, computed, stop, save = host[NUM_SUMS:].tolist()
    return Read(
        LossSums.unpack(host[:NUM_SUMS]),
        positions=int(computed),
        is_finite=not broken,
        should_stop=stop > 0,
        should_save=save > 0,
    )


def loss_row(sums: LossSums) -> dict[str, Any]:
    """Divide once: nats per token, in all and by class, None where nothing was counted.

    `loss` is cross-entropy alone. `z_loss` is the mean squared log-partition, recorded whatever train.z_loss weights it
    with: at 0 too, it tells whether logits drift away.
    """
    tokens = sums.tokens()
    row: dict[str, Any] = {"loss": number(((sums.text + sums.image + sums.special) / tokens).item())}
    for kind, (_, count) in sums.by_kind().items():
        mean = sums.mean(kind)
        row[f"{kind}_loss"] = None if mean is None else number(mean)
        row[f"{kind}_tokens"] = int(count)
    row["z_loss"] = number((sums.z / tokens).item())
    return row


def number(value: float) -> float | None:
    """JSON has no nan or inf: a value that is not finite is stored as null."""
    return value if math.isfinite(value) else None
