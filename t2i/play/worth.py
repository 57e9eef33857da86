"""What a caption is worth at each place of an image, as a heat map over it."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from t2i.errors import UserError
from t2i.generate.best_of import log_likelihoods_by_place
from t2i.runs.loading import OpenedModel
from t2i.serve.drawing import room_of
from t2i.tokens.image import centre_crop_resize, to_pixels
from t2i.tokens.sequence import prompt

SHOWN_PIXELS = 384
"""At least so many pixels per side are shown."""
HELPS, HURTS = np.array([200, 30, 30]), np.array([30, 70, 200])
"""Red where the caption makes the codes likelier, blue where it makes them less likely."""
MOST_COVERED = 0.75
"""Share of the colour where the worth is largest."""


@dataclass(frozen=True)
class Worth:
    """The worth of a caption for an image."""

    by_place: Tensor
    """(H, W) nats per code: loss under the null caption minus loss under the caption."""
    image: Image.Image
    """The image as the model reads it."""

    def heat_map(self) -> Image.Image:
        """Colour the image by the worth of each place."""
        worth = self.by_place.numpy()
        strength = np.abs(worth) / max(float(np.abs(worth).max()), 1e-9) * MOST_COVERED
        colours = np.where((worth > 0)[..., None], HELPS, HURTS)  # (H, W, 3)
        side = self.image.width * math.ceil(SHOWN_PIXELS / self.image.width)
        scale = side // len(worth)
        cover = np.kron(strength, np.ones((scale, scale)))[..., None]
        over = np.kron(colours, np.ones((scale, scale, 1)))
        # Grey, so that the only colours are those of the worth.
        grey = (
            self.image.convert("L").convert("RGB").resize((len(cover), len(cover)), Image.Resampling.BICUBIC)
        )
        mixed = np.asarray(grey) * (1 - cover) + over * cover
        return Image.fromarray(mixed.round().astype(np.uint8))

    def status(self) -> str:
        """Say what the caption is worth over the whole image, in one line."""
        helped = (self.by_place > 0).double().mean().item()
        return (
            f"{self.by_place.sum().item():+.1f} nats, {self.by_place.mean().item():+.3f} per code; it helps at"
            f" {helped:.0%} of the places, by at most {self.by_place.max().item():.2f} nats"
        )


def worth_of(opened: OpenedModel, caption: str, image: Image.Image) -> Worth:
    """Measure what a caption is worth at each place of an image, which is cropped and resized as in training.

    Raises:
        UserError: the model reads no captions.
    """
    mode = opened.model.config.sequence_mode
    if mode != "text-to-image":
        raise UserError(f"This model was trained on {mode} sequences: it reads no captions.")
    shown = centre_crop_resize(image.convert("RGB"), size=opened.image_size())
    codes = opened.needed_image_tokenizer().encode(to_pixels([shown]))  # (1, K)
    ids = opened.text_tokenizer.encode(caption)[: room_of(opened)]
    prompts = [prompt(each, layout=opened.layout, mode=mode).tolist() for each in (ids, torch.tensor([]))]
    matched, null = log_likelihoods_by_place(
        opened.model, prompts, codes.repeat(2, 1), layout=opened.layout
    )  # (K,) each
    side = math.isqrt(codes.shape[1])
    return Worth((matched - null).view(side, side), shown)
