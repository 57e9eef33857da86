"""Guards against bad steps: loss spikes, gradients that are not finite, ranks whose weights differ."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2i.distributed.collectives import of_all_ranks
from t2i.errors import NumericalError
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.metrics_log import METRICS
from t2i.train.deepspeed_internals import moments_of
from t2i.train.progress import Progress

MAX_SKIPPED = 3
"""Steps in a row without an update, or rewinds of one run, that end it."""
FEWEST_STEPS = 16
"""Losses that must be known before one can be called a spike."""
LEAST_SPREAD = 0.002
"""Smallest spread of losses that is believed, as a share of their median."""


def spike_score(loss: float, window: Sequence[float]) -> float | None:
    """Compute how many robust deviations a loss lies above the median of the window; None if that holds too few.

    The deviation is 1.4826 times the median distance from the median: the standard deviation of a normal distribution.
    """
    if len(window) < FEWEST_STEPS:
        return None
    # Medians, not mean and variance: one spike in the window would hide the next.
    middle = median(window)
    spread = 1.4826 * median(abs(value - middle) for value in window)
    # Losses that hardly differ, as of a tiny data set, would make a spike of any change.
    return (loss - middle) / max(spread, LEAST_SPREAD * abs(middle), 1e-9)


def check_updates(progress: Progress, *, run_dir: Path) -> None:
    """End a run after MAX_SKIPPED steps in a row without an update.

    Raises:
        NumericalError: there were so many; it names the last checkpoint.
    """
    step = progress.step
    # The same on every rank without asking: a skip is decided from numbers summed over ranks.
    if progress.skipped_in_a_row == MAX_SKIPPED:
        raise NumericalError(
            f"The loss or gradient was not finite in steps {step - MAX_SKIPPED + 1} to {step}, or spiked; none of them"
            f" changed the weights. Their samples are named in {run_dir / METRICS}. Last checkpoint:"
            f" {_last_checkpoint(run_dir)}. Try a smaller train.lr."
        )


def check_finite(engine: deepspeed.DeepSpeedEngine, progress: Progress, *, run_dir: Path) -> None:
    """Check all weights and the optimizer's moments, on every rank together, before they are saved.

    Raises:
        NumericalError: some are not finite; no later step can change that.
    """
    parameters = dict(engine.module.named_parameters())
    values = [*parameters.values(), *moments_of(engine)]
    # One read from the device for all tensors.
    are_finite = torch.stack([value.isfinite().all() for value in values]).tolist()
    names = [*parameters, *["the optimizer's moments"] * (len(values) - len(parameters))]
    found = of_all_ranks([name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite])
    if found:
        raise NumericalError(
            f"After step {progress.step} the values of {found[0]} are not finite, and no step can mend that. Nothing is"
            f" saved. Last checkpoint: {_last_checkpoint(run_dir)}. Try a smaller train.lr."
        )


def _last_checkpoint(run_dir: Path) -> str:
    step = checkpoints.last_step(run_dir)
    return str(checkpoints.step_folder(run_dir, step)) if step else "none"


def check_ranks_agree(module: nn.Module) -> None:
    """Compare every parameter between ranks by the sum of its bits.

    Raises:
        NumericalError: ranks hold different weights; it names the first such tensor.
    """
    if dist.get_world_size() == 1:
        return
    # Bits, not values: sums of floats depend on their order, and NaN equals nothing. One number per tensor is sent.
    sums = torch.stack([_bits(value) for value in module.parameters()])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    differing = (lowest != highest).nonzero().flatten().tolist()
    if differing:
        name = [name for name, _ in module.named_parameters()][differing[0]]
        raise NumericalError(
            f"Ranks hold different weights in {len(differing)} tensors, the first is {name}: a machine's memory or"
            " network is bad. Nothing is saved; run the same command to resume from the last checkpoint."
        )


def optimizer_bits(engine: deepspeed.DeepSpeedEngine) -> int:
    """Sum the bits of the optimizer's moments on this rank; different states have equal sums by rare chance only."""
    return sum(int(_bits(value).item()) for value in moments_of(engine))


def _bits(value: Tensor) -> Tensor:
    """Sum the bits of a tensor as integers, which is exact in any order."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[value.element_size()]
    return value.detach().contiguous().view(kind).sum(dtype=torch.int64)
