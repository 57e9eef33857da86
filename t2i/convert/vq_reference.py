"""A released image tokenizer's own steps, from its state dict, that converted models are compared with.

B batch, C channels, E width of a code, h w code grid.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.convert.vq import SourceLayout

NUM_GROUPS, EPS = 32, 1e-6

Tensors = Mapping[str, Tensor]


@torch.inference_mode()
def source_latents(tensors: Tensors, pixels: Tensor, *, layout: SourceLayout) -> Tensor:
    """Encode pixels (B, 3, H, W) in [-1, 1] to latents (B, E, h, w), before quantisation."""
    hidden = _conv(tensors, "encoder.conv_in", pixels.float(), padding=1)
    level = 0
    while _has(tensors, f"{layout.down}.{level}"):
        hidden = _level(tensors, f"{layout.down}.{level}", hidden, layout=layout, code=None)
        level += 1
    hidden = _end(
        tensors, "encoder", _middle(tensors, "encoder", hidden, layout=layout, code=None), code=None
    )
    return _conv(tensors, "quant_conv", hidden)


@torch.inference_mode()
def source_codes(tensors: Tensors, latents: Tensor, *, layout: SourceLayout) -> Tensor:
    """Return the nearest codes (B, h, w) of latents (B, E, h, w)."""
    queries, codebook = latents.movedim(1, -1), _codebook(tensors, layout=layout)
    if layout.unit_codes:
        queries = F.normalize(queries, dim=-1)
    squares = queries.square().sum(-1, keepdim=True) + codebook.square().sum(-1)
    return (squares - 2 * queries @ codebook.T).argmin(-1)


@torch.inference_mode()
def source_pixels(tensors: Tensors, codes: Tensor, *, layout: SourceLayout) -> Tensor:
    """Decode codes (B, h, w) to pixels (B, 3, H, W)."""
    code = _codebook(tensors, layout=layout)[codes].movedim(-1, 1)  # (B, E, h, w)
    hidden = _conv(tensors, "decoder.conv_in", _conv(tensors, "post_quant_conv", code), padding=1)
    hidden = _middle(tensors, "decoder", hidden, layout=layout, code=code)
    levels: list[str] = []
    while _has(tensors, f"{layout.up}.{len(levels)}"):
        levels.append(f"{layout.up}.{len(levels)}")
    for name in reversed(levels) if layout.finest_first else levels:
        hidden = _level(tensors, name, hidden, layout=layout, code=code)
    return _end(tensors, "decoder", hidden, code=code)


def _codebook(tensors: Tensors, *, layout: SourceLayout) -> Tensor:
    codebook = tensors["quantize.embedding.weight"].float()
    return F.normalize(codebook, dim=-1) if layout.unit_codes else codebook


def _has(tensors: Tensors, prefix: str) -> bool:
    return any(name.startswith(f"{prefix}.") for name in tensors)


def _level(
    tensors: Tensors, name: str, hidden: Tensor, *, layout: SourceLayout, code: Tensor | None
) -> Tensor:
    """Apply the residual blocks, each with its attention if any, then halve or double the resolution if it does."""
    block = 0
    while _has(tensors, f"{name}.{layout.residual}.{block}"):
        hidden = _residual(tensors, f"{name}.{layout.residual}.{block}", hidden, code=code)
        if _has(tensors, f"{name}.attn.{block}"):
            hidden = _attention(tensors, f"{name}.attn.{block}", hidden, code=code)
        block += 1
    if _has(tensors, f"{name}.downsample"):
        # Padded on one side only, as in the release.
        hidden = _conv(tensors, f"{name}.downsample.conv", F.pad(hidden, (0, 1, 0, 1)), stride=2)
    if _has(tensors, f"{name}.upsample"):
        doubled = hidden.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        hidden = _conv(tensors, f"{name}.upsample.conv", doubled, padding=1)
    return hidden


def _middle(
    tensors: Tensors, side: str, hidden: Tensor, *, layout: SourceLayout, code: Tensor | None
) -> Tensor:
    first, attention, second = (f"{side}.mid.{name}" for name in layout.middle)
    hidden = _residual(tensors, first, hidden, code=code)
    return _residual(tensors, second, _attention(tensors, attention, hidden, code=code), code=code)


def _end(tensors: Tensors, side: str, hidden: Tensor, *, code: Tensor | None) -> Tensor:
    hidden = F.silu(_norm(tensors, f"{side}.norm_out", hidden, code=code))
    return _conv(tensors, f"{side}.conv_out", hidden, padding=1)


def _residual(tensors: Tensors, name: str, hidden: Tensor, *, code: Tensor | None) -> Tensor:
    added = hidden
    for number in (1, 2):
        normed = F.silu(_norm(tensors, f"{name}.norm{number}", added, code=code))
        added = _conv(tensors, f"{name}.conv{number}", normed, padding=1)
    if _has(tensors, f"{name}.nin_shortcut"):
        hidden = _conv(tensors, f"{name}.nin_shortcut", hidden)
    return hidden + added


def _attention(tensors: Tensors, name: str, hidden: Tensor, *, code: Tensor | None) -> Tensor:
    """Attend over all positions with one head of all channels."""
    normed = _norm(tensors, f"{name}.norm", hidden, code=code)
    query, key, value = (_conv(tensors, f"{name}.{part}", normed).flatten(2) for part in "qkv")  # (B, C, h w)
    weights = (query.mT @ key / query.shape[1] ** 0.5).softmax(-1)  # (B, h w, h w)
    mixed = (value @ weights.mT).view_as(hidden)
    return hidden + _conv(tensors, f"{name}.proj_out", mixed)


def _norm(tensors: Tensors, name: str, hidden: Tensor, *, code: Tensor | None) -> Tensor:
    """Normalise groups of channels; MoVQGAN's decoder then scales and shifts by the code at each position."""
    # The encoder has no codes, and LlamaGen's decoder has plain norms.
    if code is None or not _has(tensors, f"{name}.conv_y"):
        return F.group_norm(hidden, NUM_GROUPS, *_affine(tensors, name), eps=EPS)
    normed = F.group_norm(hidden, NUM_GROUPS, *_affine(tensors, f"{name}.norm_layer"), eps=EPS)
    spread = F.interpolate(code, size=hidden.shape[-2:], mode="nearest")
    return normed * _conv(tensors, f"{name}.conv_y", spread) + _conv(tensors, f"{name}.conv_b", spread)


def _conv(tensors: Tensors, name: str, hidden: Tensor, *, padding: int = 0, stride: int = 1) -> Tensor:
    return F.conv2d(hidden, *_affine(tensors, name), padding=padding, stride=stride)


def _affine(tensors: Tensors, name: str) -> tuple[Tensor, Tensor]:
    return tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
