"""Low-rank adapters on the matrices of a model's layers, by peft: learned beside what is frozen, merged when saved."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from t2i.errors import UserError
from t2i.model.trainable import layers_of

ADAPTER = "default"
SCALE = 2.0
"""What the adapters' product is multiplied by (peft's lora_alpha over rank)."""


def add_lora(model: PreTrainedModel, *, rank: int) -> None:
    """Put an adapter beside every matrix of the layers, in place, and freeze all but adapters and new rows.

    The adapters' second matrices are zero, so the model computes what it did.

    Raises:
        UserError: there is no matrix to adapt.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    inside = {id(module) for module in layers_of(model).modules()}
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]
    if not targets:
        raise UserError(
            f"model.lora_rank is {rank}; the layers of {type(model).__name__} have no nn.Linear to adapt."
        )
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=targets)
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, value in model.named_parameters():
        value.requires_grad_(".lora_" in name or name.endswith(".new"))


def merge_lora(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Replace, in a state dict of `model`, adapters and the matrices beside them by the matrices that they make up."""
    adapted: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")
    ]
    for name, module in adapted:
        weight = state.pop(f"{name}.base_layer.weight")
        delta = module.get_delta_weight(ADAPTER).detach()
        for key in [key for key in state if key.startswith(f"{name}.lora_")]:
            del state[key]
        state[f"{name}.weight"] = weight + delta.to(weight.dtype)
        if f"{name}.base_layer.bias" in state:
            state[f"{name}.bias"] = state.pop(f"{name}.base_layer.bias")
