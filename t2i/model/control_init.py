"""Control initialisations: knowledge destroyed, statistics kept."""

import torch
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.model.trainable import layers_of

KINDS = ("within-tensors", "moments", "layer-order")


@torch.no_grad()
def scramble(model: nn.Module, *, kind: str, seed: int) -> None:
    """Scramble a model's weights in place.

    Args:
        kind: "within-tensors" shuffles the numbers of each tensor; "moments" draws each tensor anew from a normal of
            its mean and deviation; "layer-order" moves every layer to another place.

    Raises:
        UserError: an unknown kind, or a single layer to move.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "layer-order":
        _move_layers(layers_of(model), generator)
        return
    if kind not in KINDS:
        raise UserError(f"model.scramble is {kind!r}; wanted is none or one of {', '.join(KINDS)}.")
    change = _shuffled if kind == "within-tensors" else _redrawn
    for value in model.parameters():
        value.copy_(change(value, generator))


def _shuffled(value: Tensor, generator: torch.Generator) -> Tensor:
    return value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)


def _redrawn(value: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator)
    return value.float().mean() + noise * value.float().std(correction=0)


def _move_layers(layers: nn.ModuleList, generator: torch.Generator) -> None:
    """Give every layer the weights of another one: of the one before it, in a random circle."""
    if len(layers) < 2:
        raise UserError(f"model.scramble is layer-order; a model of {len(layers)} layer has no order.")
    circle = torch.randperm(len(layers), generator=generator).tolist()
    states = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
    for place, source in zip(circle, circle[1:] + circle[:1], strict=True):
        layers[place].load_state_dict(states[source])
