"""Decoders of fixed shape: in which shapes they are compiled, and the one that a model keeps for its next batch.

This file is uploaded with exported models, so it imports only torch and transformers.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

FIXED_STEP = 32
"""Fixed shapes have a multiple of so many positions, so that a slightly longer prompt needs no new compilation."""
MOST_WINDOWS, LEAST_WINDOW = 4, 128
"""Attention in fixed shapes is over a growing window of positions; each size of window is compiled separately."""
Kept = TypeVar("Kept", bound=nn.Module)


def windows(length: int, *, num_positions: int) -> Iterator[int]:
    """Yield the window of each step after `length` positions: the positions that it must see, rounded up."""
    size = max(LEAST_WINDOW, -(-num_positions // MOST_WINDOWS))
    for seen in range(length + 1, num_positions + 1):
        yield min(num_positions, seen + -seen % size)


def kept_decoder(
    model: PreTrainedModel,
    fits: Callable[[Kept], bool],
    make: Callable[[int], Kept],
    *,
    least_positions: int,
) -> Kept:
    """Return the model's only decoder of fixed shape; if it does not fit, a new one of as many positions as needed."""
    # In __dict__, past nn.Module's __setattr__: the decoder's buffers must not become part of the model's state.
    kept: Kept | None = model.__dict__.get("_fixed_decoder")
    if kept is not None and fits(kept):
        return kept
    del kept
    model.__dict__["_fixed_decoder"] = None  # frees its large memory before the next one's is allocated
    decoder = make(least_positions + -least_positions % FIXED_STEP)
    model.__dict__["_fixed_decoder"] = decoder
    return decoder
