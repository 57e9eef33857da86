"""What all ranks learn after the backward pass of a step: one reduction, one read from the device."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from t2i.model.loss import NUM_SUMS, LossSums


@dataclass(frozen=True)
class Read:
    """Sums over all ranks, the same on every rank."""

    sums: LossSums
    """On the CPU, in fp64."""
    positions: int
    """Positions of all micro-batches, including padding."""
    is_finite: bool
    should_stop: bool
    should_save: bool

    @property
    def tokens(self) -> int:
        """Count the tokens with a label."""
        return int(self.sums.tokens())


def tokens_of_all(labels: Tensor, *, device: torch.device) -> Tensor:
    """Count the labels (B, S) of all ranks, as an fp64 tensor () on the device."""
    # Not read here: the host would wait for the device before it could start the forward pass.
    tokens = (labels >= 0).sum(dtype=torch.float64).to(device)
    dist.all_reduce(tokens)
    return tokens


def read_step(sums: LossSums, *, positions: int, should_stop: bool, should_save: bool) -> Read:
    """Sum over ranks and read, once per step: losses, counts, and what any rank found or was asked to do.

    It comes before the update, which it may forbid, so the device waits here for one small reduction.

    Args:
        sums: of this rank's micro-batches.
        positions: of this rank's micro-batches, including padding.
        should_stop: this rank was asked to stop; one rank is enough.
        should_save: this rank was asked to save; one rank is enough.
    """
    packed = sums.pack()
    # Tested on each rank: a sum over ranks could overflow though each part is finite.
    is_broken = (~torch.isfinite(packed).all()).double()[None]
    told = torch.tensor([positions, should_stop, should_save], dtype=torch.float64, device=packed.device)
    values = torch.cat([packed, is_broken, told])  # (NUM_SUMS + 4,)
    dist.all_reduce(values)
    host = values.cpu()  # the host waits here: the update depends on what it reads
    broken, computed, stop, save = host[NUM_SUMS:].tolist()
    return Read(
        LossSums.unpack(host[:NUM_SUMS]),
        positions=int(computed),
        is_finite=not broken,
        should_stop=stop > 0,
        should_save=save > 0,
    )


def loss_row(sums: LossSums) -> dict[str, float | None]:
    """Divide once: nats per token, in all and by class; None where nothing was counted.

    `loss` is the cross-entropy only. `z_loss` is the mean squared log-partition, without the weight of train.z_loss.
    """
    tokens = sums.tokens()
    row: dict[str, float | None] = {"loss": number(((sums.text + sums.image + sums.special) / tokens).item())}
    for kind, (_, count) in sums.by_kind().items():
        mean = sums.mean(kind)
        row[f"{kind}_loss"] = None if mean is None else number(mean)
        row[f"{kind}_tokens"] = int(count)
    # At train.z_loss 0 too: it shows whether logits drift away, so whether a run needs the term.
    row["z_loss"] = number((sums.z / tokens).item())
    return row


def number(value: float) -> float | None:
    """Return a value for JSON, which has no nan and no inf: None for both."""
    return value if math.isfinite(value) else None
