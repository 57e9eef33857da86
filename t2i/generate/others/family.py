"""What a model of others needs to draw: its prompt, its codes and its image tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from t2i.tokens.image import ImageTokenizer


@dataclass(frozen=True)
class OthersTokenizer:
    """An image tokenizer with the interface of ImageTokenizer."""

    encode: Callable[[Tensor], Tensor]
    """Pixels (B, 3, H, W) in [-1, 1] -> codes (B, K)."""
    decode: Callable[[Tensor], Tensor]
    """Codes (B, K) -> pixels (B, 3, H, W)."""
    name: str

    def fingerprint(self) -> str:
        """Name it by the weights that it came with."""
        return self.name


AnyTokenizer = ImageTokenizer | OthersTokenizer


@dataclass(frozen=True)
class Family:
    """What one kind of model needs to draw."""

    body: torch.nn.Module
    """Embeddings -> hidden states, with a cache."""
    prompt: Callable[[str], list[int]]
    """Ids before the first code."""
    null_prompt: Callable[[list[int]], list[int]]
    """Ids that guidance contrasts a prompt with."""
    embed_code: Callable[[Tensor], Tensor]
    """Codes (R,) -> embeddings (R, D)."""
    logits: Callable[[Tensor], Tensor]
    """Hidden states (R, D) -> logits of codes (R, C)."""
    tokenizer: OthersTokenizer
    codes_per_side: int
    line_end: int | None = None
    """Id after each row of codes; None for none."""


@dataclass(frozen=True)
class OthersModel:
    """An opened model of others."""

    kind: str
    folder: Path
    model: PreTrainedModel
    family: Family
    pixels_per_side: int
    weights: str
    """SHA-256 of the weights on disk."""

    @property
    def dtype(self) -> str:
        """Number type that it computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    def measures_folder(self, name: str) -> Path:
        """Name the folder of its measures."""
        return self.folder / name

    def needed_image_tokenizer(self) -> OthersTokenizer:
        """Return its image tokenizer."""
        return self.family.tokenizer

    def image_size(self) -> int:
        """Return the pixels per side of the images that it draws."""
        return self.pixels_per_side
