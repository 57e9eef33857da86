"""Control initialisations: they destroy what the model knew and keep a statistic of its weights.

If pre-training helps only because its weights have a good scale or distribution, a control helps as much.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from t2i.errors import UserError
from t2i.model.trainable import layers_of


@torch.no_grad()
def control_init(model: PreTrainedModel, *, kind: str, seed: int) -> None:
    """Turn a model's weights into a control, in place.

    Args:
        kind: "within-tensors" shuffles the values of each tensor, which keeps their distribution; "moments" redraws
            each tensor from a normal distribution, which keeps mean and deviation; "layer-order" permutes the layers,
            which keeps their matrices.

    Raises:
        UserError: there is only one layer to permute, or layers are not of one kind.
    """
    # On the CPU, so that a seed means the same on every device.
    CONTROLS[kind](model, Generator().manual_seed(seed))


def _shuffle(model: PreTrainedModel, generator: Generator) -> None:
    for value in model.parameters():
        value.copy_(_shuffled(value, generator))


def _redraw(model: PreTrainedModel, generator: Generator) -> None:
    for value in model.parameters():
        value.copy_(_redrawn(value, generator))


def _shuffled(value: Tensor, generator: Generator) -> Tensor:
    return value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)


def _redrawn(value: Tensor, generator: Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator)
    # In fp32, and without Bessel's correction, which has no value for a tensor of one number.
    return value.float().mean() + noise * value.float().std(correction=0)


def _move_layers(model: PreTrainedModel, generator: Generator) -> None:
    """Give every layer the weights of the next one in a random cycle, so that no layer keeps its place."""
    layers = layers_of(model)
    if len(layers) < 2:
        raise UserError(
            f"model.control_init is layer-order; expected a model of at least 2 layers, not {len(layers)}."
        )
    circle = torch.randperm(len(layers), generator=generator).tolist()
    # Copied before any is loaded: load_state_dict writes into the very tensors that state_dict returns.
    states = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if odd := next((place for place, shape in enumerate(shapes) if shape != shapes[0]), None):
        raise UserError(
            "model.control_init is layer-order; expected a model whose layers are all alike, but layer"
            f" {odd} has other weights than layer 0."
        )
    for place, source in zip(circle, circle[1:] + circle[:1], strict=True):
        layers[place].load_state_dict(states[source])


CONTROLS: dict[str, Callable[[PreTrainedModel, Generator], None]] = {
    "within-tensors": _shuffle,
    "moments": _redraw,
    "layer-order": _move_layers,
}
"""Function for each choice of model.control_init except `none` and `fresh`, which needs no weights to begin with."""
