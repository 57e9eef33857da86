"""The shape of DeepSpeed's JSON, as far as a run reads it; DeepSpeed itself reads the rest."""

from typing import TypedDict


class Enabled(TypedDict, total=False):
    """Section `bf16` or `fp16`."""

    enabled: bool


class Zero(TypedDict, total=False):
    """Section `zero_optimization`."""

    stage: int
    overlap_comm: bool
    reduce_bucket_size: int


class DataTypes(TypedDict, total=False):
    """Section `data_types`."""

    grad_accum_dtype: str


class OptimizerParams(TypedDict, total=False):
    """The only parameter of the optimizer that the JSON may set."""

    torch_adam: bool


class Optimizer(TypedDict, total=False):
    """Section `optimizer`."""

    params: OptimizerParams


class DsConfig(TypedDict, total=False):
    """The JSON of --ds_config, after t2i/train/ds_config.py has checked it."""

    train_micro_batch_size_per_gpu: int
    zero_optimization: Zero
    bf16: Enabled
    fp16: Enabled
    data_types: DataTypes
    optimizer: Optimizer
