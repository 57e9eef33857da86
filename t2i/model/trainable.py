"""Which parameters are trainable: the paper's ladder from the embeddings only to everything (Figure 6).

    embeddings                        input embeddings and LM head
    norms          = embeddings     + all norms and learned positions
    first-half     = norms          + the first half of the layers
    feed-forward   = norms          + every layer's feed-forward part
    all                               everything

LoRA adapters are apart from the ladder: every matrix of the layers is frozen, and its adapter is trainable.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from t2i.config import Trainable
from t2i.errors import UserError, first_line
from t2i.model.open_lm.class_reading_open_lm import FEED_FORWARD_NAMES, find_layers, is_norm, of_text

ADAPTER = "default"
SCALE = 2.0
"""Factor of the adapters' product (peft's lora_alpha over rank)."""


def set_trainable(model: PreTrainedModel, *, recipe: Trainable) -> None:
    """Freeze, in place, every parameter that the recipe does not name.

    Raises:
        UserError: a recipe that adds nothing to this model, or one that freezes everything.

    Source: paper, Figure 6.
    """
    # By identity: a tied head is the embedding's own tensor, and must not be frozen under its other name.
    trainable = {id(value) for module in RECIPES[recipe](model) for value in module.parameters()}
    for value in model.parameters():
        value.requires_grad_(id(value) in trainable)
    if not any(value.requires_grad for value in model.parameters()):
        raise UserError(
            f"model.trainable is {recipe}, which freezes every parameter of {type(model).__name__}."
        )


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the trainable parameters, and all."""
    sizes = [(value.numel(), value.requires_grad) for value in model.parameters()]
    return sum(size for size, is_trainable in sizes if is_trainable), sum(size for size, _ in sizes)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Find the stack of layers.

    Raises:
        UserError: there is none.
    """
    found = find_layers(model)
    if found is None:
        raise UserError(f"{type(model).__name__} has no list of layers.")
    return found


def layer_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """List the trainable matrices that the layers multiply by, (R, C) each.

    Left out are norms, biases, a state-space layer's own tensors, and experts that are kept as one tensor.
    """
    modules = (module for layer in find_layers(model) or () for module in layer.modules())
    matrices = (module.weight for module in modules if isinstance(module, nn.Linear | Conv1D))
    # Once each: layers may share theirs.
    return list(dict.fromkeys(v for v in matrices if isinstance(v, nn.Parameter) and v.requires_grad))


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _with_norms(model: PreTrainedModel) -> list[nn.Module]:
    return _embeddings(model) + _norms_and_positions(model)


def _norms_and_positions(model: PreTrainedModel) -> list[nn.Module]:
    """Find norms and embeddings of positions."""
    found: list[nn.Module] = []
    for module in of_text(model):
        is_position = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        if is_norm(module) or is_position:
            found.append(module)
    return found


def _first_half(layers: nn.ModuleList) -> list[nn.Module]:
    if len(layers) < 2:
        raise UserError(
            f"model.trainable is first-half; expected a model of at least 2 layers, not {len(layers)}."
        )
    return list(layers[: len(layers) // 2])


RECIPES: dict[str, Callable[[PreTrainedModel], list[nn.Module]]] = {
    "all": lambda model: [model],
    "embeddings": _embeddings,
    "norms": _with_norms,
    "first-half": lambda model: _with_norms(model) + _first_half(layers_of(model)),
    "feed-forward": lambda model: _with_norms(model) + [_feed_forward(layer) for layer in layers_of(model)],
}
"""The trainable modules of each choice of model.trainable; each level includes those of the level below."""


def _feed_forward(layer: nn.Module) -> nn.Module:
    names = [name for name, _ in layer.named_children()]
    name = next((name for name in FEED_FORWARD_NAMES if name in names), None)
    if name is None:
        raise UserError(
            f"model.trainable is feed-forward; expected a layer with one of {', '.join(FEED_FORWARD_NAMES)}, but it has"
            f" {', '.join(names)}."
        )
    return layer.get_submodule(name)


def add_lora(model: PreTrainedModel, *, rank: int) -> None:
    """Add a LoRA adapter to every matrix of the layers, in place, and freeze all but adapters and new embeddings.

    The adapters' second matrices are zero, so the model first computes what it did before.

    Raises:
        UserError: there is no matrix to adapt, or one that cannot be.
    """
    from peft import LoraConfig, inject_adapter_in_model  # here: it takes seconds, and few runs have adapters

    inside = {id(module) for module in layers_of(model).modules()}
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]
    if not targets:
        raise UserError(
            f"model.lora_rank is {rank}; expected 0, because the layers of {type(model).__name__} have no nn.Linear."
        )
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=targets)
    try:
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:  # Mamba's kernels read some weights past their modules
        kind = type(model).__name__
        raise UserError(f"model.lora_rank is {rank}; expected 0 for {kind}: {first_line(error)}") from error
    for name, value in model.named_parameters():
        # New image embeddings have no pre-trained value to adapt: they are trained in full (resize.split_rows).
        value.requires_grad_(".lora_" in name or name.endswith(".new"))


def recompute_activations(model: PreTrainedModel) -> None:
    """Compute what is inside a layer again in the backward pass, in place of keeping it.

    Raises:
        UserError: the model's class cannot.
    """
    # Not the reentrant form, transformers 4's own: it gives no gradient where what enters the layers has none, as
    # under LoRA without new embeddings.
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"model.gradient_checkpointing is on; expected off: {first_line(error)}") from error


def merge_lora(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Merge, in a state dict of `model`, the adapters into the matrices that they belong to, on the CPU.

    The checkpoint is then a plain model of its class, which sampling and export open without peft.
    """
    adapted: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")
    ]
    for name, module in adapted:
        weight = state.pop(f"{name}.base_layer.weight")
        # Not where the model is: a GPU that trains it may have no room for a second one.
        weight, delta = weight.cpu(), module.get_delta_weight(ADAPTER).detach().cpu()
        for key in [key for key in state if key.startswith(f"{name}.lora_")]:
            del state[key]
        state[f"{name}.weight"] = weight + delta.to(weight.dtype)
        if f"{name}.base_layer.bias" in state:
            state[f"{name}.bias"] = state.pop(f"{name}.base_layer.bias")
