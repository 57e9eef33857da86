"""What a run refuses to learn from: losses that jump, gradients that are not finite, ranks that differ."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2i.errors import NumericalError
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.metrics_log import METRICS
from t2i.train.deepspeed_internals import moments_of
from t2i.train.progress import Progress

MAX_SKIPPED = 3
"""Steps in a row without an update, or rewinds of one run, after which it ends."""
FEWEST_STEPS = 16
"""No loss is called a spike before so many."""
LEAST_SPREAD = 0.002
"""Spread of losses, as a share of their median, below which it is not believed."""


def spike_score(loss: float, window: Sequence[float]) -> float | None:
    """Tell how many deviations a loss lies above the median of those before; None where these are too few.

    The deviation is 1.4826 times the median distance from the median, which is that of a normal distribution.
    """
    if len(window) < FEWEST_STEPS:
        return None
    # Medians, not mean and variance: a spike that entered the window would hide the next one.
    middle = median(window)
    spread = 1.4826 * median(abs(value - middle) for value in window)
    return (loss - middle) / max(spread, LEAST_SPREAD * abs(middle), 1e-9)


def check_updates(progress: Progress, *, run_dir: Path) -> None:
    """End a run after MAX_SKIPPED steps in a row without an update.

    Raises:
        NumericalError: with the last good checkpoint.
    """
    step = progress.step
    # Alike on every rank without asking: what a step skips is decided from reduced numbers.
    if progress.skipped_in_a_row == MAX_SKIPPED:
        last = checkpoints.step_folder(run_dir, checkpoints.last_step(run_dir))
        raise NumericalError(
            f"The loss or gradient was not finite in steps {step - MAX_SKIPPED + 1} to {step}, or jumped; none of them"
            f" changed the weights. Their samples are named in {run_dir / METRICS}. Last checkpoint:"
            f" {last if last.exists() else 'none'}. Try a smaller train.lr."
        )


def check_ranks_agree(module: nn.Module) -> None:
    """Compare every parameter between ranks by the sum of its bits.

    Raises:
        NumericalError: ranks hold different weights; the first such tensor.
    """
    if dist.get_world_size() == 1:
        return
    # Bits, not values: sums of floats depend on their order, and NaN equals nothing. One number per tensor travels.
    sums = torch.stack([_bits(value) for value in module.parameters()])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    differing = (lowest != highest).nonzero().flatten().tolist()
    if differing:
        name = [name for name, _ in module.named_parameters()][differing[0]]
        raise NumericalError(
            f"Ranks hold different weights in {len(differing)} tensors, the first is {name}: a machine's memory or"
            " network is bad. Nothing is saved; the same command goes on from the last checkpoint."
        )


def optimizer_bits(engine: deepspeed.DeepSpeedEngine) -> int:
    """Sum the bits of Adam's moments on this rank: equal sums tell equal states, for all that chance is worth."""
    return sum(int(_bits(value).item()) for value in moments_of(engine))


def _bits(value: Tensor) -> Tensor:
    """Sum the bits of a tensor as integers: exact, in any order."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[value.element_size()]
    return value.detach().contiguous().view(kind).sum(dtype=torch.int64)
