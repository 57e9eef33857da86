"""Control initialisations: what the model knew is destroyed, a statistic of its weights is kept.

If pre-training helps only because its weights have a good scale or distribution, a control helps as much.
"""

import torch
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.model.trainable import layers_of

CONTROLS = ("within-tensors", "moments", "layer-order")


@torch.no_grad()
def control_init(model: nn.Module, *, kind: str, seed: int) -> None:
    """Turn a model's weights into a control, in place.

    Args:
        kind: "within-tensors" shuffles the values of each tensor, which keeps their distribution; "moments" draws each
            tensor anew from a normal distribution, which keeps mean and deviation; "layer-order" moves every layer to
            another place, which keeps all of its matrices.

    Raises:
        UserError: an unknown kind, or a single layer to move.
    """
    generator = torch.Generator().manual_seed(
        seed
    )  # on the CPU, so that a seed means the same on every device
    if kind == "layer-order":
        _move_layers(layers_of(model), generator)
        return
    if kind not in CONTROLS:
        raise UserError(f"model.scramble is {kind!r}; wanted is none or one of {', '.join(CONTROLS)}.")
    change = _shuffled if kind == "within-tensors" else _redrawn
    for value in model.parameters():
        value.copy_(change(value, generator))


def _shuffled(value: Tensor, generator: torch.Generator) -> Tensor:
    return value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)


def _redrawn(value: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator)
    return value.float().mean() + noise * value.float().std(correction=0)


def _move_layers(layers: nn.ModuleList, generator: torch.Generator) -> None:
    """Give every layer the weights of the one after it in a random circle, so that no layer keeps its place."""
    if len(layers) < 2:
        raise UserError(f"model.scramble is layer-order; a model of {len(layers)} layer has no order.")
    circle = torch.randperm(len(layers), generator=generator).tolist()
    # Copied before any is loaded: load_state_dict writes into the tensors that these are views of.
    states = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
    for place, source in zip(circle, circle[1:] + circle[:1], strict=True):
        layers[place].load_state_dict(states[source])
