"""Convert released image tokenizers to diffusers' VQModel, with the same codes and the same decoded images.

Source: the checkpoints of https://github.com/ai-forever/MoVQGAN and https://github.com/FoundationVision/LlamaGen.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from t2i.convert.released import check_fit, only_tensors, plain_names
from t2i.errors import CheckpointError

PROJECTION = re.compile(r"attentions\.\d+\.to_.*weight$")
PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
"""Parts that encode and decode; training files also hold losses, discriminators and averages."""


@dataclass(frozen=True)
class SourceLayout:
    """How a release names the parts of its model."""

    down: str
    """Prefix of the encoder's levels, finest first."""
    up: str
    """Prefix of the decoder's levels."""
    finest_first: bool
    """Whether level 0 of the decoder is the finest one (in diffusers it is the coarsest)."""
    residual: str
    """Name of the residual blocks of a level."""
    middle: tuple[str, str, str]
    """Names of residual block, attention and residual block in the middle of encoder and decoder."""
    unit_codes: bool
    """Whether latents and codes are normalised to length 1."""
    wrappers: tuple[str, ...]
    """Keys of a training file that may hold the weights, the preferred one first."""
    dropped: tuple[str, ...]
    """Names that encoding and decoding do not need."""


MOVQGAN = SourceLayout(
    down="encoder.down",
    up="decoder.up",
    finest_first=True,
    residual="block",
    middle=("block_1", "attn_1", "block_2"),
    unit_codes=False,
    wrappers=("state_dict",),
    dropped=(),
)
LLAMAGEN = SourceLayout(
    down="encoder.conv_blocks",
    up="decoder.conv_blocks",
    finest_first=False,
    residual="res",
    middle=("0", "1", "2"),
    unit_codes=True,
    wrappers=("ema", "model", "state_dict"),
    dropped=("quantize.codebook_used",),
)

INNER_NAMES = (
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.(norm_layer|conv_y|conv_b)\.", r"\1.spatial_norm.\2."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""Names that both releases share -> diffusers' names, applied in this order."""


class VqSizes(TypedDict):
    """Arguments of diffusers' VQModel."""

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    layers_per_block: int
    latent_channels: int
    num_vq_embeddings: int
    vq_embed_dim: int
    norm_type: str
    lookup_from_codebook: bool


def vq_tensors(content: Mapping[str, object], *, layout: SourceLayout) -> tuple[dict[str, object], list[str]]:
    """Find the weights in a released file or a training file.

    Returns:
        tensors with the release's names, and the groups of names that were left out.
    """
    wrapper, inner = next(
        ((key, value) for key in layout.wrappers if isinstance(value := content.get(key), Mapping)),
        (None, content),
    )
    names = plain_names(inner, prefixes=("module.", "_orig_mod."))
    kept = {name: value for name, value in names.items() if name.split(".")[0] in PARTS}
    left_out = {name.split(".")[0] for name in names if name not in kept}
    kept = {name: value for name, value in kept.items() if name not in layout.dropped}
    return kept, sorted(left_out | (set(content) - {wrapper} if wrapper else set()))


def load_vq(tensors: Mapping[str, object], *, layout: SourceLayout, source: Path) -> VQModel:
    """Build diffusers' model on a release's tensors, with sizes from their shapes.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    config = vq_config(tensors, layout=layout, source=source)
    renamed: dict[str, object] = {}
    for name, value in tensors.items():
        new_name = diffusers_name(name, layout=layout, num_levels=len(config["block_out_channels"]))
        # Releases have attention's projections as 1 x 1 convolutions, diffusers as matrices.
        if isinstance(value, Tensor) and PROJECTION.search(new_name) and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]
        renamed[new_name] = value
    with torch.device("meta"):
        model = VQModel(**config)
    fitting = check_fit(renamed, model.state_dict(), source=f"{source}, in diffusers' names,")
    if layout.unit_codes:
        # diffusers does not normalise latents, and need not: of codes of equal length, the nearest to a latent is
        # the one with the nearest direction, whatever the latent's length.
        codes = fitting["quantize.embedding.weight"]
        fitting["quantize.embedding.weight"] = F.normalize(codes.float(), dim=-1).to(codes.dtype)
    model.load_state_dict({name: value.contiguous() for name, value in fitting.items()}, assign=True)
    return model.eval()


def vq_config(tensors: Mapping[str, object], *, layout: SourceLayout, source: Path) -> VqSizes:
    """Read the sizes of diffusers' VQModel from the shapes of a release's tensors.

    Raises:
        CheckpointError: a tensor that the sizes are read from is missing.
    """
    num_levels, num_layers = (
        _count(tensors, layout.down),
        _count(tensors, f"{layout.down}.0.{layout.residual}"),
    )
    firsts = [f"{layout.down}.{level}.{layout.residual}.0.conv1.weight" for level in range(num_levels)]
    needed = ["encoder.conv_out.weight", "quantize.embedding.weight", *firsts]
    shapes = {name: value.shape for name, value in only_tensors(tensors).items()}
    missing = [name for name in needed if name not in shapes]
    if missing or not num_levels:
        raise CheckpointError(f"{source} is no such checkpoint: it has no {(missing or [layout.down])[0]}.")
    has_attention = [_count(tensors, f"{layout.down}.{level}.attn") > 0 for level in range(num_levels)]
    codebook = shapes["quantize.embedding.weight"]
    return {
        "block_out_channels": tuple(shapes[name][0] for name in firsts),
        "down_block_types": tuple(_block_type("Down", "Encoder", attends) for attends in has_attention),
        "up_block_types": tuple(_block_type("Up", "Decoder", attends) for attends in has_attention[::-1]),
        "layers_per_block": num_layers,
        "latent_channels": shapes["encoder.conv_out.weight"][0],
        "num_vq_embeddings": codebook[0],
        "vq_embed_dim": codebook[1],
        "norm_type": "spatial" if "decoder.norm_out.conv_y.weight" in tensors else "group",
        "lookup_from_codebook": True,
    }


def diffusers_name(name: str, *, layout: SourceLayout, num_levels: int) -> str:
    """Translate a release's name of one tensor to diffusers' name."""
    # Escaped, because the prefixes hold dots. The decoder's levels may be counted in the other direction.
    down, up = re.escape(layout.down), re.escape(layout.up)
    name = re.sub(rf"^{down}\.", "encoder.down_blocks.", name)
    if match := re.match(rf"{up}\.(\d+)(?=\.)", name):
        level = num_levels - 1 - int(match[1]) if layout.finest_first else int(match[1])
        name = f"decoder.up_blocks.{level}{name[match.end() :]}"
    name = re.sub(rf"\.{layout.residual}\.(\d+)\.", r".resnets.\1.", name)
    new_middle = ("resnets.0", "attentions.0", "resnets.1")
    for old, new in zip(layout.middle, new_middle, strict=True):
        name = name.replace(f".mid.{old}.", f".mid_block.{new}.")
    for pattern, replacement in INNER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _block_type(direction: str, side: str, attends: bool) -> str:
    return f"{'Attn' if attends else ''}{direction}{side}Block2D"


def _count(tensors: Mapping[str, object], prefix: str) -> int:
    """Count the different indices that follow a prefix."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return len({match[1] for name in tensors if (match := pattern.match(name))})
