"""Prompts read with a model's own forward and KV cache, whatever its class.

This file is uploaded with exported models, so it imports only torch and transformers.

R rows, P positions of the longest prompt, T positions so far, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def body_of(model: PreTrainedModel) -> Any:
    """Return the part of a causal LM that computes hidden states, without the LM head."""
    # transformers' own name for it, base_model, is the whole model in some classes, such as Gemma 3's.
    if model.base_model is not model:
        return model.base_model
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else model


class PlainDecoder:
    """Continue from the ids read so far, with the model's own forward and KV cache."""

    def __init__(self, model: PreTrainedModel, mask: Tensor) -> None:
        self.body, self.mask = body_of(model), mask  # (R, T)
        # Counted from each row's first real id, as in training, where prompts are not padded on the left.
        self.positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (R, T)
        # None: the model makes its own. Layers with a sliding window or a convolution need other caches than the rest.
        self.cache: Any = None
        self.length = 0

    def __call__(self, ids: Tensor) -> Tensor:
        """Read ids (R, S), or (R,) for one more per row, and return the last hidden states (R, D)."""
        ids = ids.view(len(self.mask), -1)
        past, self.length = self.length, self.length + ids.shape[1]
        outputs = self.body(
            ids,
            attention_mask=self.mask[:, : self.length],
            position_ids=self.positions[:, past : self.length].contiguous(),  # XGLM takes no view
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = outputs.past_key_values
        return outputs.last_hidden_state[:, -1]


def left_padded(
    rows: Sequence[Sequence[int]], *, length: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Pad rows on the left to one length: ids and mask (B, length)."""
    # On the left, so that all prompts end at one position, from which all codes continue.
    # Any id will do as padding: the mask hides it.
    ids = [[row[0]] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
