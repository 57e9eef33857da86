"""The keys of DeepSpeed's JSON that t2i reads; DeepSpeed itself reads the whole file."""

from typing import TypedDict

DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's default of reduce_bucket_size, in elements."""


class Bf16(TypedDict, total=False):
    """DeepSpeed's bf16."""

    enabled: bool


class Zero(TypedDict, total=False):
    """DeepSpeed's zero_optimization."""

    stage: int
    overlap_comm: bool
    round_robin_gradients: bool
    reduce_bucket_size: int
    """Elements."""


class OptimizerParams(TypedDict, total=False):
    """DeepSpeed's optimizer.params, of which the run owns all others."""

    torch_adam: bool


class Optimizer(TypedDict, total=False):
    """DeepSpeed's optimizer."""

    params: OptimizerParams


class DataTypes(TypedDict, total=False):
    """DeepSpeed's data_types."""

    grad_accum_dtype: str


class DsConfig(TypedDict, total=False):
    """DeepSpeed's JSON, as read_ds_config has checked it."""

    train_micro_batch_size_per_gpu: int
    """Sequences."""
    bf16: Bf16
    zero_optimization: Zero
    optimizer: Optimizer
    data_types: DataTypes


def bucket_elements(zero: Zero, *, largest: int, num_ranks: int) -> int:
    """Return the elements of a bucket that gradients are reduced in, where the largest tensor has `largest`.

    DeepSpeed reduces a tensor that no bucket holds by itself. Where that overlaps with the backward pass, it frees the
    gradient while the device may still read it, on all ranks whose partition has no part of the tensor.
    """
    asked = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    return max(asked, largest) if num_ranks > 1 and zero.get("overlap_comm") else asked
