"""DeepSpeed's JSON, checked before anything heavy is imported or any folder made.

DeepSpeed ignores top-level keys that it does not know, and takes "auto" for a default. So what t2i honours is listed
here, and everything else is refused by name, all of it at once.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from t2i.config import DsConfig
from t2i.errors import UserError
from t2i.shipped import find_shipped

OWNED_BY_THE_RUN = {
    "gradient_clipping": "train.grad_clip",
    "train_batch_size": "train.global_batch_tokens",
    "gradient_accumulation_steps": "train.global_batch_tokens",
    "scheduler": "train.warmup_steps",
    "activation_checkpointing": "model.gradient_checkpointing",
}
"""Keys that a setting of the run decides instead."""
REFUSED = {
    "fp16": "its loss scaling skips steps by design; use bf16 or fp32",
    "amp": "use bf16 or fp32",
    "torch_autocast": "use bf16 or fp32",
    "elasticity": "it chooses the batch; any number of ranks that makes the same batch can resume a run anyway",
    "autotuning": "it starts runs of its own; `t2i plan` says which micro-batch fits",
    "curriculum_learning": "the order of samples is the loader's",
    "data_efficiency": "the order of samples is the loader's",
    "progressive_layer_drop": "it changes the model in training",
    "compression_training": "it changes the model in training",
    "quantize_training": "it changes the model in training",
    "weight_quantization": "it changes the model in training",
    "sparse_attention": "it changes the model",
    "sparse_gradients": "embeddings have dense gradients",
    "gradient_predivide_factor": "ZeRO-2 does not take it",
    "prescale_gradients": "ZeRO-2 does not take it",
    "gradient_allreduce_op": "gradients are scaled for a mean over ranks",
    "pipeline": "every rank holds the whole model",
    "tensor_parallel": "every rank holds the whole model",
    "expert_parallel": "every rank holds the whole model",
    "sequence_parallel_size": "every rank holds whole sequences",
    "hybrid_engine": "t2i samples by itself",
    "compile": "it compiles another forward pass",
    "aio": "nothing is offloaded to a disk",
    "checkpoint": "checkpoints are written and committed by t2i",
    "nebula": "checkpoints are written and committed by t2i",
    "datastates": "checkpoints are written and committed by t2i",
    "tensorboard": "t2i writes metrics.jsonl and TensorBoard; DeepSpeed's losses are scaled",
    "wandb": "t2i writes metrics.jsonl and TensorBoard; DeepSpeed's losses are scaled",
    "csv_monitor": "t2i writes metrics.jsonl and TensorBoard; DeepSpeed's losses are scaled",
    "comet": "t2i writes metrics.jsonl and TensorBoard; DeepSpeed's losses are scaled",
    "zero_optimization.offload_param": "it needs stage 3",
    "zero_optimization.offload_optimizer": "offloaded gradients that are not finite would stay for the next step",
    "zero_optimization.cpu_offload": "offloaded gradients that are not finite would stay for the next step",
    "zero_optimization.zenflow": "it updates weights with old gradients",
    "bf16.bf16_master_weights_and_grads": "weights are kept in fp32",
    "bf16.bf16_optimizer_states": "the optimizer's moments are kept in fp32",
}
"""Keys of DeepSpeed that t2i cannot honour, each with the reason."""
HONOURED = {
    "": (
        *("train_micro_batch_size_per_gpu", "bf16", "zero_optimization", "optimizer", "data_types"),
        *("communication_data_type", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        *("steps_per_print", "dump_state", "wall_clock_breakdown", "memory_breakdown", "comms_logger"),
        *("flops_profiler",),
    ),
    "bf16": ("enabled", "check_grad_overflow", "immediate_grad_update"),
    "data_types": ("grad_accum_dtype",),
    "optimizer": ("params",),
    "zero_optimization": (
        *("stage", "contiguous_gradients", "overlap_comm", "reduce_scatter", "reduce_bucket_size"),
        *("allgather_partitions", "allgather_bucket_size", "use_multi_rank_bucket_allreduce"),
        *("round_robin_gradients", "ignore_unused_parameters", "load_from_fp32_weights"),
    ),
}
"""Keys that may have any value that DeepSpeed takes, unless _values says otherwise; by the object that holds them."""


def read_ds_config(path: Path) -> DsConfig:
    """Read a DeepSpeed JSON and check that t2i honours all of it, and that it leaves the science to the run.

    Raises:
        UserError: no such file, no JSON, or keys and values that are not for this file; all of them are named.
    """
    path = find_shipped(path)
    try:
        ds_config: Any = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--ds_config {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"--ds_config {path} is no JSON: {error}.") from error
    if not isinstance(ds_config, dict):
        raise UserError(f"--ds_config {path} holds {type(ds_config).__name__}; expected an object of keys.")
    problems = [*_kinds(ds_config)] or [*_keys(ds_config), *_values(ds_config)]
    if problems:
        raise UserError(f"--ds_config {path}: {'; '.join(problems)}.")
    # DeepSpeed itself refuses some of these by their mere names.
    used = {key: value for key, value in ds_config.items() if key in HONOURED[""]}
    return cast(DsConfig, used | {"zero_optimization": _honoured(ds_config, "zero_optimization")})


def _honoured(ds_config: Mapping[str, Any], holder: str) -> dict[str, Any]:
    return {key: value for key, value in ds_config[holder].items() if key in HONOURED[holder]}


def _kinds(ds_config: Mapping[str, Any]) -> Iterator[str]:
    for name in filter(None, HONOURED):
        if not isinstance(ds_config.get(name, {}), dict):
            yield f"{name} is {ds_config[name]!r}; expected an object of keys"


def _keys(ds_config: Mapping[str, Any]) -> Iterator[str]:
    """Say of each key that t2i does not honour why, unless its value switches it off."""
    for holder, honoured in HONOURED.items():
        for key, value in ds_config.get(holder, {} if holder else ds_config).items():
            name = f"{holder}.{key}" if holder else key
            if key in honoured or _is_off(value):
                continue
            # One experiment, one place to read it from: resolved.yaml would be silent about what the JSON changed.
            if name in OWNED_BY_THE_RUN:
                yield f"{name} is decided by --{OWNED_BY_THE_RUN[name]}; remove it"
            elif holder == "optimizer":
                yield (
                    f"{name} is decided by --train.optimizer, --train.lr and the settings beside them; expected"
                    " params.torch_adam at most"
                )
            elif name in REFUSED:
                yield f"{name} is not supported, because {REFUSED[name]}; remove it"
            elif holder == "zero_optimization" and key.startswith(("stage3_", "zero_", "mics_", "sub_group")):
                yield f"{name} is for ZeRO stage 3, which is not supported; remove it"
            else:
                close = difflib.get_close_matches(key, honoured, n=1)
                yield f"{name} is no key that t2i knows; " + (
                    f"perhaps you meant {close[0]}" if close else "remove it"
                )


def _is_off(value: object) -> bool:
    """Tell whether a value says that a feature is not used."""
    if isinstance(value, dict):
        return value.get("device") == "none" or not value.get("enabled", bool(value))
    return value is None or value is False


def _values(ds_config: Mapping[str, Any]) -> Iterator[str]:
    """Say of each value that t2i cannot honour what was expected."""
    parameters = ds_config.get("optimizer", {}).get("params", {})
    if not isinstance(parameters, dict) or not all(
        key == "torch_adam" and isinstance(value, bool) for key, value in parameters.items()
    ):
        yield (
            f"optimizer.params is {parameters!r}, but --train.lr and the settings beside it decide; expected"
            " torch_adam, true or false, at most"
        )
    micro_batch = ds_config.get("train_micro_batch_size_per_gpu")
    if type(micro_batch) is not int or micro_batch < 1:
        yield (
            f"train_micro_batch_size_per_gpu is {micro_batch!r}; expected a whole number >= 1, in sequences,"
            " the largest that fits"
        )
    steps = ds_config.get("steps_per_print", 1)
    if type(steps) is not int or steps < 1:
        yield f"steps_per_print is {steps!r}; expected a whole number >= 1"
    zero, bf16 = ds_config.get("zero_optimization", {}), ds_config.get("bf16", {})
    if bf16.get("check_grad_overflow", True) is not True:
        yield (
            f"bf16.check_grad_overflow is {bf16['check_grad_overflow']!r}, with which a gradient that is not finite"
            " would reach the weights; expected true, or no such key"
        )
    if zero.get("load_from_fp32_weights", True) is not True:
        yield (
            f"zero_optimization.load_from_fp32_weights is {zero['load_from_fp32_weights']!r}, with which a resumed run"
            " would continue from rounded weights; expected true, or no such key"
        )
    if zero.get("stage") not in (1, 2):
        # Stage 0 lets a non-finite gradient into the weights; under stage 3 no rank has all weights to export.
        yield f"zero_optimization.stage is {zero.get('stage')!r}; expected 1 or 2"
    has_bf16, accumulated = (
        bf16.get("enabled", False),
        ds_config.get("data_types", {}).get("grad_accum_dtype"),
    )
    if not isinstance(has_bf16, bool):
        yield f"bf16.enabled is {has_bf16!r}; expected true or false"
    if accumulated not in (None, "fp32", "bf16"):
        yield f'data_types.grad_accum_dtype is {accumulated!r}; expected "fp32" or "bf16"'
    if zero.get("stage") == 1 and has_bf16 is True and accumulated == "fp32":
        # DeepSpeed then takes another optimizer, which has no way to skip the update of a step.
        yield "zero_optimization.stage is 1 with bf16 and grad_accum_dtype fp32; expected stage 2"
    known = {"train_micro_batch_size_per_gpu", "stage", "enabled", "grad_accum_dtype", "torch_adam"}
    for name, value in _leaves(ds_config):
        holder, _, key = name.rpartition(".")
        if value == "auto" and key not in known and key in HONOURED.get(holder, ()):
            # Hugging Face's Trainer fills it in; DeepSpeed drops it.
            yield f"{name} is 'auto', which nothing fills in; expected a value, or no such key"


def _leaves(values: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
