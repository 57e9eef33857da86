"""open_lm's attention: norms, rotary positions, masks, and the weights where they are asked for.

This file is uploaded with exported models, so it imports only torch, transformers and the files beside it.

B batch, S new positions, T all positions so far, H heads, D width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_open_lm import OpenLMConfig

ROTARY_BASE = 10_000.0
"""Base of the rotary frequencies, open_lm's constant."""
Remember = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Appends a layer's new keys and values (B, H, S, head_dim), and returns all so far."""


def make_norm(config: OpenLMConfig) -> nn.Module:
    """Build the norm that config.norm_type names, over the last dimension D."""
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    has_gain = config.norm_type != "no_wb_layer_norm"
    has_bias = has_gain and not config.norm_type.startswith("gain_only")
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=has_gain, bias=has_bias)


def rotary_angles(positions: Tensor, *, head_dim: int) -> tuple[Tensor, Tensor]:
    """Compute cos and sin (B, 1, S, head_dim) in fp32 for positions (B, S)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * ROTARY_BASE**-exponents  # (B, S, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads (B, H, S, head_dim) by halves, in fp32, and return them in their own dtype."""
    wide = heads.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)


def eager_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention weights (B, H, S, T) as SDPA does inside, with the softmax in fp32."""
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.float().softmax(-1).to(query.dtype)


def mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Mix values (B, H, T, head_dim) by SDPA, for queries (B, H, S, head_dim)."""
    dtype = query.dtype
    query, key, value, mask = for_learning(query, key, value, mask)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    return mixed.to(dtype)


def for_learning(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return what SDPA mixes: in fp32 if it is bf16, on a CPU, and of a model that learns; else as it is."""
    # The gradient takes about twice as long in bf16 there.
    if query.dtype != torch.bfloat16 or query.device.type != "cpu" or not query.requires_grad:
        return query, key, value, mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    return query.float(), key.float(), value.float(), mask


class Attention(nn.Module):
    """Causal self-attention with one fused projection (rows q, k, v in whole blocks)."""

    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.q_norm = make_norm(config) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        *,
        mask: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        remember: Remember | None,
        is_eager: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix values; the weights (B, H, S, T) are returned only if is_eager."""
        query, key, value = self.in_proj(hidden).chunk(3, dim=-1)  # (B, S, D) each
        # The norms come before the split into heads: open_lm normalises over all heads together.
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_norm(query), self.k_norm(key), value)
        )  # (B, H, S, head_dim)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        if remember is not None:
            key, value = remember(key, value, self.layer)
        if mask is not None:
            # A cache of fixed size returns all its positions; those that are not written yet are hidden.
            unwritten = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = F.pad(mask, (0, key.shape[2] - mask.shape[-1]), value=unwritten)
        if is_eager:
            weights = eager_weights(query, key, mask)
            mixed = weights @ value
        else:
            weights = None
            # Without a mask SDPA can use its fastest kernels. One new position sees all, so nothing is to be hidden.
            is_causal = mask is None and query.shape[2] > 1
            mixed = mix(query, key, value, mask, is_causal=is_causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights


def attention_mask_of(
    attention_mask: Tensor | None, hidden: Tensor, *, past: int, is_needed: bool
) -> Tensor | None:
    """Build a mask (B, 1, S, T), or None where SDPA's is_causal does the same and none is needed."""
    num_new = hidden.shape[1]
    if attention_mask is not None and attention_mask.dim() == 4:  # made by the caller, for any order
        is_number = attention_mask.is_floating_point()
        return attention_mask.to(hidden.dtype) if is_number else attention_mask.bool()
    if attention_mask is None and not is_needed and (past == 0 or num_new == 1):
        return None
    total = past + num_new
    queries = torch.arange(past, total, device=hidden.device)[:, None]
    keys = torch.arange(total, device=hidden.device)[None]
    mask = (keys <= queries)[None, None]  # (1, 1, S, T)
    if attention_mask is not None:
        # A padded query sees itself, or its softmax would be over nothing and give nan.
        mask = (mask & attention_mask[:, None, None, :total].bool()) | (keys == queries)
    return mask


def positions_of(
    position_ids: Tensor | None, attention_mask: Tensor | None, hidden: Tensor, *, past: int
) -> Tensor:
    """Return positions (B, S): as given, else counted from the mask, else from the cache's length."""
    num_new = hidden.shape[1]
    if position_ids is not None:
        return position_ids
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + num_new]
    return torch.arange(past, past + num_new, device=hidden.device)[None]
