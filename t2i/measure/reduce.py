"""Sums of a model's losses over batches that are shared out among ranks."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from t2i.distributed.collectives import rank_and_size

T = TypeVar("T")
ShouldStop = Callable[[], bool]


class Interrupted(Exception):
    """A measure was interrupted on request, and has no result."""


def never() -> bool:
    """Ask for no interruption."""
    return False


@torch.inference_mode()
def sum_over_ranks(
    batches: Iterable[T],
    measure: Callable[[T], Tensor],
    *,
    model: PreTrainedModel,
    size: int,
    should_stop: ShouldStop,
    description: str = "",
) -> Tensor:
    """Sum measure(batch), (size,) in float64, over this rank's batches and then over ranks: one reduction.

    Args:
        description: of a bar that the first rank shows; empty for none.

    Raises:
        Interrupted: on every rank, if should_stop asked any of them before a batch, or one that has none.
    """
    # The last element counts ranks that were asked to stop. In the same reduction, so that ranks leave together.
    sums = torch.zeros(size + 1, dtype=torch.float64)
    was_training = model.training  # a measure stands between two training steps, and must leave no trace
    model.eval()
    sums[-1] = should_stop()  # a rank that has no batch may be the one that was asked
    is_silent = not description or rank_and_size()[0] > 0
    for batch in tqdm(batches, desc=description, unit="batch", disable=is_silent):
        if sums[-1] or should_stop():
            sums[-1] = 1
            break
        sums[:-1] += measure(batch)
    model.train(was_training)
    if dist.is_initialized():
        sums = sums.to(model.device)  # NCCL reduces nothing on the CPU
        dist.all_reduce(sums)
    if sums[-1] > 0:
        raise Interrupted
    return sums[:-1].cpu()
