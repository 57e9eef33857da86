"""open_lm's layers for few new tokens per row, over keys and values whose memory is allocated once.

This file is uploaded with exported models, so it imports only torch and transformers.

R rows, W new tokens per row, N = R W tokens, T positions so far, L layers, H heads, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig


class StaticCache:
    """Keys and values (R, H, T, head_dim) of every layer; a cache that grows would be copied at each of K steps."""

    def __init__(self, memory: Sequence[Tensor]) -> None:
        self.memory = memory  # L of (2, R, H, P + K, head_dim)
        self.length = 0

    @classmethod
    def empty(cls, config: PretrainedConfig, *, num_rows: int, num_positions: int, like: Tensor) -> Self:
        """Allocate zeroed memory for so many rows and positions, with the device and dtype of `like`."""
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (2, num_rows, config.num_attention_heads, num_positions, head_dim)
        return cls([like.new_zeros(shape) for _ in range(config.num_hidden_layers)])

    def get_seq_length(self) -> int:
        """Return the number of positions held."""
        return self.length

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (R, H, S, head_dim) of a layer; return all so far."""
        end = self.length + key.shape[2]
        keys, values = self.memory[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        # Every layer writes at the same positions, so the last one counts them.
        if layer == len(self.memory) - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]


def weights_of(body: Any) -> list[tuple[Tensor, ...]]:
    """List the four weight matrices of each layer."""
    return [
        (
            block.attention.in_proj.weight,
            block.attention.out_proj.weight,
            block.feed_forward.w12.weight,
            block.feed_forward.w3.weight,
        )
        for block in body.layers
    ]


def signed(angles: tuple[Tensor, Tensor] | None, head_dim: int) -> list[Tensor] | None:
    """Negate the sines of the first half, so that a rotation is one addcmul."""
    if angles is None:
        return None
    cos, sin = angles
    first = torch.arange(head_dim, device=sin.device) < head_dim // 2
    return [cos, torch.where(first, -sin, sin)]


def forward(
    body: Any,
    products: Sequence[Sequence[Callable[[Tensor], Tensor]]],
    ids: Tensor,
    memory: Sequence[Tensor],
    remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    angles: list[Tensor] | None,
    mask: Tensor | None,
) -> Tensor:
    """Compute the normalised hidden states (N, D) of new ids (N,), W per row, row by row.

    Args:
        products: in_proj, out_proj, w12 and w3 of each layer.
        remember: writes new keys and values (2, N, H, head_dim) into a layer's memory, and returns those to attend to.
        angles: cos and signed sin (N, 1, 1, head_dim).
        mask: attention mask of SDPA, (R, 1, W, T).
    """
    heads_shape = (len(ids), 3, memory[0].shape[2], memory[0].shape[4])
    hidden = body.post_embed_norm(body.tok_embeddings(ids))  # (N, D)
    for block, (in_proj, out_proj, w12, w3), layer in zip(body.layers, products, memory, strict=True):
        projected = in_proj(block.attention_norm(hidden))  # (N, 3 D)
        heads = _heads(block.attention, projected, heads_shape, angles, has_norms=body.config.qk_norm)
        keys, values = remember(layer, heads[:, 1:].transpose(0, 1))
        query = heads[:, 0].unflatten(0, (len(keys), -1)).transpose(1, 2)  # (R, H, W, head_dim)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)  # (R, H, W, head_dim)
        hidden = hidden + out_proj(mixed.transpose(1, 2).reshape(hidden.shape))
        gate, value = w12(block.ffn_norm(hidden)).chunk(2, dim=-1)  # (N, intermediate) each
        hidden = hidden + w3(F.silu(gate) * value)
    return body.norm(hidden)


def _heads(
    attention: Any, projected: Tensor, shape: tuple[int, ...], angles: list[Tensor] | None, *, has_norms: bool
) -> Tensor:
    """Normalise and rotate projections (N, 3 D): queries, keys and values (N, 3, H, head_dim)."""
    heads = projected.view(shape)  # (N, 3, H, head_dim)
    if has_norms:
        flat = projected.view(len(projected), 3, -1)  # (N, 3, D), a view: heads sees what is written here
        # open_lm normalises queries and keys over all heads together, before they are split.
        flat[:, 0] = attention.q_norm(flat[:, 0])
        flat[:, 1] = attention.k_norm(flat[:, 1])
    if angles is not None:
        cos, signed_sin = angles
        # Queries and keys (N, 2, H, head_dim), rotated in fp32 as in training; fp64 stays.
        pair = heads[:, :2].to(torch.promote_types(heads.dtype, cos.dtype))
        swapped = pair.roll(pair.shape[-1] // 2, dims=-1)
        heads[:, :2] = torch.addcmul(pair * cos, swapped, signed_sin)
    return heads
