"""Released image tokenizers -> diffusers' VQModel: same codes for the same picture, same picture for the same codes.

Source: the checkpoints of https://github.com/ai-forever/MoVQGAN and https://github.com/FoundationVision/LlamaGen.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from t2i.convert.released import check_fit, plain_names
from t2i.errors import CheckpointError

PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
"""What encodes and decodes; training files hold losses, discriminators and averages beside them."""


@dataclass(frozen=True)
class SourceLayout:
    """How a release names the parts of its model."""

    down: str
    """Levels of the encoder, finest first."""
    up: str
    """Levels of the decoder."""
    finest_first: bool
    """Whether level 0 of the decoder is the finest one (diffusers': the coarsest)."""
    residual: str
    """Residual blocks of a level."""
    middle: tuple[str, str, str]
    """Residual block, attention and residual block between encoder's and decoder's levels."""
    unit_codes: bool
    """Whether latents and codes are compared, and codes decoded, at length 1."""
    wrappers: tuple[str, ...]
    """Keys that a training file may hold the weights under, the preferred one first."""
    dropped: tuple[str, ...]
    """Names that play no part in encoding and decoding."""


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
"""What both releases call alike -> diffusers' names, in this order."""


def vq_tensors(content: Mapping[str, Any], *, layout: SourceLayout) -> tuple[dict[str, Any], list[str]]:
    """Find the weights in a released or a training file.

    Returns:
        tensors under the release's names, and the other groups of names that were left out.
    """
    wrapper = next((key for key in layout.wrappers if isinstance(content.get(key), Mapping)), None)
    names = plain_names(content[wrapper] if wrapper else content, prefixes=("module.", "_orig_mod."))
    kept = {name: value for name, value in names.items() if name.split(".")[0] in PARTS}
    left_out = {name.split(".")[0] for name in names if name not in kept}
    kept = {name: value for name, value in kept.items() if name not in layout.dropped}
    return kept, sorted(left_out | (set(content) - {wrapper} if wrapper else set()))


def load_vq(tensors: dict[str, Any], *, layout: SourceLayout, source: Path) -> VQModel:
    """Build diffusers' model on a release's tensors; its sizes are read from their shapes.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    config = vq_config(tensors, layout=layout, source=source)
    renamed = {}
    for name, value in tensors.items():
        new_name = diffusers_name(name, layout=layout, num_levels=len(config["block_out_channels"]))
        is_matrix = re.search(r"attentions\.\d+\.to_.*weight$", new_name) and value.shape[2:] == (1, 1)
        renamed[new_name] = value[:, :, 0, 0] if is_matrix else value
    with torch.device("meta"):
        model = VQModel(**config)
    check_fit(renamed, model.state_dict(), source=f"{source}, in diffusers' names,")
    if layout.unit_codes:
        # Of codes of one length, the nearest to a latent of any length is the one of the nearest direction.
        codes = renamed["quantize.embedding.weight"]
        renamed["quantize.embedding.weight"] = F.normalize(codes.float(), dim=-1).to(codes.dtype)
    model.load_state_dict({name: value.contiguous() for name, value in renamed.items()}, assign=True)
    return model.eval()


def vq_config(tensors: Mapping[str, Any], *, layout: SourceLayout, source: Path) -> dict[str, Any]:
    """Read the sizes of diffusers' VQModel off the shapes of a release's tensors.

    Raises:
        CheckpointError: what the sizes are read from is missing.
    """
    num_levels, num_layers = (
        _count(tensors, layout.down),
        _count(tensors, f"{layout.down}.0.{layout.residual}"),
    )
    firsts = [f"{layout.down}.{level}.{layout.residual}.0.conv1.weight" for level in range(num_levels)]
    needed = ["encoder.conv_out.weight", "quantize.embedding.weight", *firsts]
    missing = [name for name in needed if not isinstance(tensors.get(name), Tensor)]
    if missing or not num_levels:
        raise CheckpointError(f"{source} is no such checkpoint: it has no {(missing or [layout.down])[0]}.")
    has_attention = [_count(tensors, f"{layout.down}.{level}.attn") > 0 for level in range(num_levels)]
    codebook = tensors["quantize.embedding.weight"]
    return {
        "block_out_channels": tuple(tensors[name].shape[0] for name in firsts),
        "down_block_types": tuple(_block_type("Down", "Encoder", attends) for attends in has_attention),
        "up_block_types": tuple(_block_type("Up", "Decoder", attends) for attends in has_attention[::-1]),
        "layers_per_block": num_layers,
        "latent_channels": tensors["encoder.conv_out.weight"].shape[0],
        "num_vq_embeddings": codebook.shape[0],
        "vq_embed_dim": codebook.shape[1],
        "norm_type": "spatial" if "decoder.norm_out.conv_y.weight" in tensors else "group",
        "lookup_from_codebook": True,
    }


def diffusers_name(name: str, *, layout: SourceLayout, num_levels: int) -> str:
    """Translate one name of a release."""
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


def _count(tensors: Mapping[str, Any], prefix: str) -> int:
    """Count the numbers that follow a prefix."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return len({match[1] for name in tensors if (match := pattern.match(name))})
