"""A forward pass on a GGUF file's own tensors, step by step, that converted models are compared with.

B batch, S sequence, H heads, G key heads, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What the forward pass needs of the file's metadata."""

    num_layers: int
    num_heads: int
    num_key_heads: int
    norm_eps: float
    rope_base: float
    pairs_neighbours: bool
    """Positions turn the pairs (2i, 2i + 1) of a head, as in llama's files, and not (i, i + head_dim / 2)."""


@torch.inference_mode()
def gguf_logits(tensors: Mapping[str, Tensor], input_ids: Tensor, *, sizes: Sizes) -> Tensor:
    """Compute logits (B, S, V) in fp32 from dequantised tensors under GGUF's names."""
    hidden = tensors["token_embd.weight"][input_ids]  # (B, S, D)
    for layer in range(sizes.num_layers):
        block = {
            name.removeprefix(f"blk.{layer}."): value
            for name, value in tensors.items()
            if name.startswith(f"blk.{layer}.")
        }
        hidden = hidden + _attention(block, _norm(hidden, block["attn_norm.weight"], sizes), sizes)
        hidden = hidden + _feed_forward(block, _norm(hidden, block["ffn_norm.weight"], sizes))
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return _norm(hidden, tensors["output_norm.weight"], sizes) @ head.T


def _norm(hidden: Tensor, gain: Tensor, sizes: Sizes) -> Tensor:
    return hidden * (hidden.square().mean(-1, keepdim=True) + sizes.norm_eps).rsqrt() * gain


def _product(block: Mapping[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    product = hidden @ block[f"{name}.weight"].T
    return product + block[f"{name}.bias"] if f"{name}.bias" in block else product


def _attention(block: Mapping[str, Tensor], hidden: Tensor, sizes: Sizes) -> Tensor:
    query, key, value = (
        _product(block, f"attn_{name}", hidden).unflatten(-1, (heads, -1))
        for name, heads in (("q", sizes.num_heads), ("k", sizes.num_key_heads), ("v", sizes.num_key_heads))
    )
    if "attn_q_norm.weight" in block:
        query = _norm(query, block["attn_q_norm.weight"], sizes)
        key = _norm(key, block["attn_k_norm.weight"], sizes)
    query, key = _turn(query, sizes), _turn(key, sizes)
    repeats = sizes.num_heads // sizes.num_key_heads
    key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -torch.inf).softmax(-1), value)
    return _product(block, "attn_output", mixed.flatten(2))


def _turn(heads: Tensor, sizes: Sizes) -> Tensor:
    """Rotate the pairs of heads (B, S, H, head_dim) by an angle that grows with the position."""
    half = heads.shape[-1] // 2
    angles = torch.arange(heads.shape[1])[:, None] * sizes.rope_base ** (
        -torch.arange(half) / half
    )  # (S, half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (S, 1, half)
    if sizes.pairs_neighbours:
        first, second = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _feed_forward(block: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    gate = _product(block, "ffn_gate", hidden)
    return _product(block, "ffn_down", gate * gate.sigmoid() * _product(block, "ffn_up", hidden))
