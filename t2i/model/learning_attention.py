"""Attention of Hugging Face's classes while they learn: on a CPU bf16 goes through fp32, as in open_lm's own."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from t2i.model.open_lm.attention_open_lm import for_learning

SDPA = "sdpa"
USUAL = ALL_ATTENTION_FUNCTIONS[SDPA]


def register() -> None:
    """Let every class of this process that attends by SDPA do it by `attend`."""
    # Under the usual name: masks are chosen by it, and a config that is saved has no other.
    ALL_ATTENTION_FUNCTIONS.register(SDPA, attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Mix values (B, H, T, head_dim) for queries (B, G H, S, head_dim), called by transformers.

    Returns:
        values of each query (B, S, G H, head_dim), and no weights.
    """
    dtype = query.dtype
    query, key, value, attention_mask = for_learning(query, key, value, attention_mask)
    mixed, _ = USUAL(module, query, key, value, attention_mask, **kwargs)
    return mixed.to(dtype), None
