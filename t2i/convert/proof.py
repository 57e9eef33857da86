"""The check that a converted language model computes what its checkpoint does."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from t2i.errors import CheckpointError

NUM_PROOF_IDS = 24
LOGITS = 2e-5
"""Largest difference of logits that fp32 rounding explains, relative to the largest logit or to 5."""

Tell = Callable[[str], None]
"""Receives the messages of a conversion, one sentence each; a launcher passes print."""


@torch.inference_mode()
def prove_logits(model: PreTrainedModel, reference: Callable[[Tensor], Tensor], *, of: str) -> str:
    """Compare a converted model's logits with those of a reference on ids (1, N); return a sentence.

    Args:
        of: what the reference computes on.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    ids = torch.linspace(0, model.config.vocab_size - 1, NUM_PROOF_IDS).long()[None]
    expected = reference(ids)
    difference = (model(ids).logits - expected).abs().max().item()
    # `not <=`, so that nan fails too.
    if not difference <= LOGITS * max(5, expected.abs().max().item()):
        raise CheckpointError(
            f"the converted model gives logits that differ by {difference:.1e}; nothing written."
        )
    return (
        f"checked: for {NUM_PROOF_IDS} tokens the written folder gives the logits of a forward pass on {of}"
        f" (largest difference {difference:.1e} of {expected.abs().max():.1f})"
    )
