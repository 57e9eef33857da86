"""Image weights beside a language model's own: what is routed, what is frozen, and the proof that text stays."""

import copy

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from t2i.errors import CheckpointError, UserError
from t2i.model.growth_checks import check_routed
from t2i.model.open_lm.configuration_routed import RoutedConfig
from t2i.model.open_lm.modeling_routed import Routed, RoutedForCausalLM
from t2i.model.resize import split_rows

IMAGE_PARTS = ("image", "down", "up")
"""Names, in modeling_routed.py, of the modules that only image positions pass."""


def route(model: PreTrainedModel, *, kind: str, rank: int, num_text_rows: int) -> RoutedForCausalLM:
    """Give a grown language model image weights, split its embeddings, and freeze all that text passes.

    Raises:
        UserError: it has image weights of another kind, no part of this kind, or parts that cannot be routed.
    """
    if isinstance(model, RoutedForCausalLM):
        found = (model.config.image_weights, model.config.image_rank)
        if found != (kind, rank):
            raise UserError(
                f"model.image_weights is {kind} of rank {rank}; expected {found[0]} of rank {found[1]}, those of"
                " model.init."
            )
        routed = model
    else:
        config = RoutedConfig(
            # Copied, because transformers writes the attention that it chose into the one that it is given.
            text_config=copy.deepcopy(model.config),
            image_weights=kind,
            image_rank=rank,
            num_text_rows=num_text_rows,
        )
        try:
            routed = RoutedForCausalLM(config, model)
        except ValueError as error:
            raise UserError(f"model.image_weights is {kind}: {error}.") from error
    split_rows(routed, num_old=num_text_rows)
    for name, value in routed.named_parameters():
        value.requires_grad_(is_of_images(name))
    if routed.device.type != "meta":  # a plan only counts what is there
        check_routed(routed)
    return routed


def num_idle(model: PreTrainedModel) -> int:
    """Count the weights of matrices that an image position does not pass, because it has a copy of its own."""
    copied = (module.text for module in model.modules() if isinstance(module, Routed))
    return sum(value.numel() for text in copied for value in text.parameters() if value.dim() == 2)


def is_of_images(name: str) -> bool:
    """Tell whether a parameter of a routed model acts on image positions and codes alone."""
    return name.endswith(".new") or not set(IMAGE_PARTS).isdisjoint(name.split(".")[:-1])


def text_tensors(model: RoutedForCausalLM) -> dict[str, Tensor]:
    """Return the parameters that text passes, under the same names in training and in a loaded folder."""
    rows = model.config.num_text_rows
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    found = {}
    for owner, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False):
            if not is_of_images(f"{owner}.{name}"):
                # Split in training, the text part of the embeddings has another name, and a loaded one has more rows.
                is_end = id(module) in ends
                found[f"{owner}.{'weight' if is_end else name}"] = value.detach()[: rows if is_end else None]
    return found


def text_hash(model: RoutedForCausalLM) -> str:
    """Hash the parameters that text passes (xxh128, hex), the same in every precision that holds them exactly."""
    digest = xxhash.xxh128()
    for name, value in sorted(text_tensors(model).items()):
        digest.update(name.encode())
        digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_text(model: PreTrainedModel, *, name: str) -> None:
    """Check that a routed model's text weights are those of the language model that it began from.

    Raises:
        CheckpointError: they are not.
    """
    if isinstance(model, RoutedForCausalLM) and text_hash(model) != model.config.text_hash:
        raise CheckpointError(
            f"{name}: the weights that text passes are no longer those of the language model that training began from."
        )


def check_precision(model: PreTrainedModel, *, dtype: torch.dtype) -> None:
    """Check that training in a precision keeps the text weights exactly.

    Raises:
        UserError: it would round them.
    """
    if not isinstance(model, RoutedForCausalLM):
        return
    for name, value in text_tensors(model).items():
        if not torch.equal(value.to(dtype).to(value.dtype), value):
            precision = str(dtype).removeprefix("torch.")
            raise UserError(
                f"model.image_weights {model.config.image_weights} keeps the language model bit for bit, but"
                f" {precision} would round {name}. Train with a DeepSpeed JSON of fp32, or start from a model"
                f" that is stored in {precision}."
            )
