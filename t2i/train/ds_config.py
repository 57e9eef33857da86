"""DeepSpeed's JSON, checked before anything heavy is imported or any folder made."""

import json
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
}
"""Keys that would change the result of a run, and the setting that decides each instead."""


def read_ds_config(path: Path) -> DsConfig:
    """Read a DeepSpeed JSON and check that it leaves the science to the run.

    Raises:
        UserError: no such file, no JSON, or a value that a setting of the run decides.
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
    # One experiment, one place to read it from: resolved.yaml would be silent about what the JSON changed.
    for key, owner in OWNED_BY_THE_RUN.items():
        if key in ds_config:
            raise UserError(f"{path} sets {key}, which --{owner} decides; remove it from the JSON.")
    for key in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(ds_config.get(key, {}), dict):
            raise UserError(f"{path}: {key} is {ds_config[key]!r}; expected an object of keys.")
    optimizer = ds_config.get("optimizer", {"params": {}})
    parameters = optimizer.get("params") if isinstance(optimizer, dict) else None
    if not isinstance(parameters, dict) or set(optimizer) != {"params"} or set(parameters) - {"torch_adam"}:
        raise UserError(
            f"{path} sets the optimizer, which --train.lr and the settings beside it decide; expected at most"
            " torch_adam there."
        )
    micro_batch = ds_config.get("train_micro_batch_size_per_gpu")
    if type(micro_batch) is not int or micro_batch < 1:
        raise UserError(
            f"{path}: train_micro_batch_size_per_gpu is {micro_batch!r}; expected a whole number >= 1, in sequences."
        )
    stage = ds_config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2):
        # Stage 0 lets a non-finite gradient into the weights; under stage 3 no rank has all weights to export.
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; expected 1 or 2.")
    has_bf16 = ds_config.get("bf16", {}).get("enabled", False)
    if stage == 1 and has_bf16 and ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        # DeepSpeed then takes another optimizer, which has no way to skip the update of a step.
        raise UserError(
            f"{path}: zero_optimization.stage is 1 with bf16 and grad_accum_dtype fp32; expected stage 2."
        )
    if ds_config.get("fp16", {}).get("enabled"):
        raise UserError(f"{path} enables fp16, whose loss scaling skips steps by design; use bf16 or fp32.")
    return cast(DsConfig, ds_config)
