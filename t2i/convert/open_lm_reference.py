"""A forward pass on open_lm's own state dict, step by step, that converted models are compared with.

B batch, S sequence, H heads, D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from t2i.model.open_lm.configuration_open_lm import OpenLMConfig


@torch.inference_mode()
def open_lm_logits(tensors: Mapping[str, Tensor], input_ids: Tensor, *, config: OpenLMConfig) -> Tensor:
    """Compute logits (B, S, V) in fp32 from tensors under open_lm's names."""
    hidden = tensors["tok_embeddings.weight"][input_ids].float()  # (B, S, D)
    if config.post_embed_norm:
        hidden = _norm(tensors, "post_embed_norm", hidden, config=config)
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}"
        normed = _norm(tensors, f"{prefix}.attention_norm", hidden, config=config)
        hidden = hidden + _attention(tensors, f"{prefix}.attention", normed, config=config)
        normed = _norm(tensors, f"{prefix}.ffn_norm", hidden, config=config)
        hidden = hidden + _feed_forward(tensors, f"{prefix}.feed_forward", normed)
    return _product(tensors, "output", _norm(tensors, "norm", hidden, config=config))


def _product(tensors: Mapping[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    return hidden @ tensors[f"{name}.weight"].float().T


def _norm(tensors: Mapping[str, Tensor], name: str, hidden: Tensor, *, config: OpenLMConfig) -> Tensor:
    """Normalise by the root mean square (except in rms_norm after subtracting the mean), with gain and bias if any."""
    if config.norm_type != "rms_norm":
        hidden = hidden - hidden.mean(-1, keepdim=True)
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
    gain, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
    normed = normed if gain is None else normed * gain.float()
    return normed if bias is None else normed + bias.float()


def _attention(tensors: Mapping[str, Tensor], name: str, hidden: Tensor, *, config: OpenLMConfig) -> Tensor:
    query, key, value = _product(tensors, f"{name}.in_proj", hidden).chunk(3, dim=-1)
    if config.qk_norm:
        query = _norm(tensors, f"{name}.q_norm", query, config=config)
        key = _norm(tensors, f"{name}.k_norm", key, config=config)
    query, key, value = (part.unflatten(-1, (config.num_attention_heads, -1)) for part in (query, key, value))
    # By the file's own frequencies, not by the config: a wrong guess there must not prove itself.
    frequencies = tensors.get(f"{name}.pos_embed.inv_freq")
    if frequencies is not None:
        # rotary rotates by the position. head_rotary rotates by the index of the head: a mistake in open_lm's early
        # releases, whose weights were trained with it.
        axis = 1 if config.positional_embedding_type == "rotary" else 2
        query, key = (_turn(part, axis=axis, frequencies=frequencies) for part in (query, key))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -torch.inf).softmax(-1), value)
    return _product(tensors, f"{name}.out_proj", mixed.flatten(2))


def _turn(heads: Tensor, *, axis: int, frequencies: Tensor) -> Tensor:
    """Rotate each pair (d, d + head_dim / 2) of heads (B, S, H, head_dim) by an angle that grows along `axis`."""
    half = heads.shape[-1] // 2
    steps = torch.arange(heads.shape[axis]).view([-1 if dim == axis else 1 for dim in range(4)])
    # Frequencies of a file in low precision are rounded; our classes, and the training's tables in fp32, are exact.
    is_exact = frequencies.dtype == torch.float32
    angles = steps * (frequencies if is_exact else 10_000 ** (-torch.arange(half) / half))
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def _feed_forward(tensors: Mapping[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    gate, value = _product(tensors, f"{name}.w12", hidden).chunk(2, dim=-1)
    return _product(tensors, f"{name}.w3", gate * gate.sigmoid() * value)
