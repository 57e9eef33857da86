"""A frozen vision encoder that codes are aligned to: what it sees in each place of an image.

EfficientNet-Lite0 comes with the installed packages; others are folders in transformers' layout, such as a CLIP's, a
SigLIP's or a DINOv2's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from t2i.errors import UserError, first_line
from t2i.measure.clip import whole_model
from t2i.measure.features import EFFICIENTNET_DIMS, EFFICIENTNET_SIZE, efficientnet_maps
from t2i.measure.folder_features import LOADING, PREPROCESSOR, read_preprocessing
from t2i.model.foreign_folder import UNUSABLE, read_description

EFFICIENTNET = "efficientnet_lite0"
"""What --align-to calls the network of the installed packages."""


@dataclass(frozen=True)
class VisionEncoder:
    """A frozen network of images."""

    width: int
    """Channels of its maps."""
    size: int
    """Pixels per side that it reads."""
    network: Callable[[Tensor], Tensor]
    """float32 pixels (B, 3, size, size) in [0, 255] -> maps (B, width, H, W)."""

    @classmethod
    def load(cls, name: str, *, device: torch.device | str = "cpu") -> "VisionEncoder":
        """Open EFFICIENTNET, or a folder.

        Raises:
            UserError: the folder holds no vision encoder that transformers opens.
        """
        if name != EFFICIENTNET:
            return _open_folder(Path(name), device=torch.device(device))
        return cls(EFFICIENTNET_DIMS, EFFICIENTNET_SIZE, efficientnet_maps(torch.device(device)))

    @torch.no_grad()
    def grid(self, pixels: Tensor, *, side: int) -> Tensor:
        """Describe each place of images (B, 3, H, W) in [-1, 1], on a grid of side x side: (B, side, side, width)."""
        resized = F.interpolate(pixels, size=(self.size, self.size), mode="bicubic", antialias=True)
        maps = self.network(((resized + 1) * 127.5).clamp(0, 255))
        return F.adaptive_avg_pool2d(maps, side).permute(0, 2, 3, 1)


def is_vision_encoder(name: str) -> bool:
    """Tell a vision encoder from a sentence encoder: its folder says how to prepare images."""
    return name == EFFICIENTNET or (Path(name) / PREPROCESSOR).is_file()


def _open_folder(folder: Path, *, device: torch.device) -> VisionEncoder:
    read_description(folder)
    size, mean, deviation = read_preprocessing(folder / PREPROCESSOR)
    scale = torch.tensor([mean, deviation], device=device)[:, None, :, None, None]  # (2, 1, 3, 1, 1)
    try:
        model = whole_model(AutoModel, folder, **LOADING).to(device)
        # A CLIP or SigLIP is two towers.
        tower = getattr(model, "vision_model", model)
        patch = getattr(tower.config, "patch_size", None)
        num_patches = (size // patch) ** 2 if isinstance(patch, int) else 0

        def network(pixels: Tensor) -> Tensor:
            scaled = (pixels / 255 - scale[0]) / scale[1]
            return _maps(tower(pixel_values=scaled).last_hidden_state, num_patches=num_patches)

        width = network(torch.zeros(1, 3, size, size, device=device)).shape[1]
    except UNUSABLE as error:
        raise UserError(
            f"--align-to {folder} cannot be opened as a vision encoder: {first_line(error)}."
        ) from error
    return VisionEncoder(width, size, network)


def _maps(hidden: Tensor, *, num_patches: int) -> Tensor:
    """Lay out last hidden states as maps (B, E, H, W): those of a convolution, or tokens (B, S, E) of a transformer.

    Raises:
        ValueError: the tokens are not of a square.
    """
    if hidden.ndim == 4:
        return hidden
    # A class token and registers come before the patches. Where patches were merged (Swin), all tokens are patches.
    tokens = hidden[:, -num_patches:] if 0 < num_patches <= hidden.shape[1] else hidden
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a square")
    return tokens.transpose(1, 2).unflatten(2, (side, side))
