"""Training with compiled layers (train.compile): each layer of the model one by one, in few shapes.

The loss stays as it is: its chunks add into one gradient in a fixed order, which a compiler would not keep.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._dynamo.config
from transformers import PreTrainedModel

from t2i.data.batching import COMPILED_POSITIONS
from t2i.errors import UserError
from t2i.model.open_lm.modeling_routed import RoutedForCausalLM
from t2i.model.trainable import layers_of


def compile_layers(model: PreTrainedModel, *, seq_len: int, backend: str = "inductor") -> None:
    """Let every layer be compiled at its first call; parameters, their names and the saved files stay the same.

    Args:
        seq_len: tokens per sequence, which bounds the number of shapes.
        backend: of torch.compile.

    Raises:
        UserError: the model's positions go through weights by their kind, so that hardly two batches have one shape.
    """
    if isinstance(model, RoutedForCausalLM):
        raise UserError(
            "train.compile is on with model.image_weights, whose layers sort positions by kind: every batch would be"
            " compiled anew. Leave one of them out."
        )
    # Per length a whole micro-batch and the smaller last one. torch gives up compiling at 8 shapes, and says so once.
    shapes = 2 * math.ceil(seq_len / COMPILED_POSITIONS)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, shapes + 2)
    # One by one, not the whole model: all layers share one compiled function, which takes seconds instead of minutes.
    for layer in layers_of(model):
        # One shape each: what is compiled for any length is slower, and lengths come in multiples here.
        layer.compile(dynamic=False, backend=backend)


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled layers as plain ones within this block."""
    # What is measured and drawn between steps has other shapes and needs no gradient: it would be compiled anew.
    with torch.compiler.set_stance("force_eager"):
        yield
