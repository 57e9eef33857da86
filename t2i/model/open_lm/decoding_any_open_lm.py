"""Decoding with a model of one of transformers' own classes.

This file is uploaded with exported models, so it imports only torch, transformers and the files beside it.

B captions, R = 2 B rows with guidance (conditional, then unconditional), P positions of the longest prompt, K codes per
image, T positions so far, D width.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .reading_open_lm import PlainDecoder, left_padded


def begin_any(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    empty_prompt: Sequence[int] | None,
    num_codes: int,
    is_fixed: bool = False,
) -> tuple[Tensor, PlainDecoder]:
    """Read the prompts as begin_decoding does, with a model of one of transformers' own classes.

    Raises:
        ValueError: is_fixed, which these classes do not have.
    """
    if is_fixed:
        raise ValueError(
            f"{type(model).__name__} samples with transformers' own KV cache, which is not compiled here"
        )
    rows = [*prompts, *([empty_prompt] * len(prompts) if empty_prompt else [])]
    ids, mask = left_padded(rows, length=max(map(len, rows)), device=model.device)  # (R, P)
    # One mask for all later positions too: every code may be attended to by those after it.
    decoder = PlainDecoder(model, F.pad(mask.long(), (0, num_codes), value=1))
    return decoder(ids), decoder
