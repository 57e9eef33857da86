"""Batches of one shape, so that an image does not depend on what is drawn beside it."""

import io
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from t2i.config import SamplerConfig
from t2i.generate.image_files import png_text
from t2i.generate.sample import decode_images, room_for_captions
from t2i.model.open_lm.sampling_open_lm import caption_codes
from t2i.runs.loading import OpenedModel
from t2i.serve.waiting import Asked


def room_of(opened: OpenedModel) -> int:
    """Count the tokens of a caption that a sequence had room for in training."""
    return room_for_captions(opened.model)


def cut_caption(opened: OpenedModel, caption: str) -> str:
    """Cut a caption to what the model reads of it."""
    ids = opened.text_tokenizer.encode(caption)
    return caption if len(ids) <= room_of(opened) else opened.text_tokenizer.decode(ids[: room_of(opened)])


class OneShape:
    """Samples up to batch_size images at a time, always in a batch of one shape.

    Rounding depends on the shape of a batch, and where two codes are nearly tied, rounding decides. So every batch has
    one shape: it is filled up to batch_size, and two more captions keep the other sizes the same. The longest fixes the
    length of all prompts; the empty one sees to it that there is always padding, hence always a mask.
    """

    def __init__(self, opened: OpenedModel, *, batch_size: int) -> None:
        self.opened, self.batch_size = opened, batch_size
        longest = "a "
        while len(opened.text_tokenizer.encode(longest)) < room_of(opened):
            longest *= 2
        self._fixed = [longest, ""]

    def codes(
        self,
        images: Sequence[Asked],
        *,
        sampler: SamplerConfig,
        on_code: Callable[[list[Tensor]], object] = len,
    ) -> Tensor:
        """Sample codes (B, K) of B images, at most batch_size.

        Args:
            on_code: called after each code with all codes so far, of whose rows the first B are these images; what it
                raises ends the sampling.
        """
        missing = self.batch_size - len(images)
        codes = caption_codes(
            self.opened.model,
            [image.caption for image in images] + [""] * missing + self._fixed,
            tokenizer=self.opened.text_tokenizer.tokenizer,
            seeds=[image.seed for image in images] + [0] * (missing + len(self._fixed)),
            guidance_scale=sampler.guidance_scale,
            temperature=sampler.temperature,
            top_k=sampler.top_k,
            top_p=sampler.top_p,
            # Windows would let the other images of a batch decide how this one's products are rounded.
            window=1,
            on_code=on_code,
        )  # (batch_size + 2, K)
        return codes[: len(images)]

    def decoded(self, codes: Tensor) -> list[Image.Image]:
        """Decode codes (B, K) to B images, in the batch's one shape too."""
        missing = self.batch_size - len(codes)
        filled = torch.nn.functional.pad(codes, (0, 0, 0, missing))  # (batch_size, K)
        return decode_images(self.opened.needed_image_tokenizer(), filled)[: len(codes)]

    def files(
        self, images: Sequence[Asked], drawn: Sequence[Image.Image], *, sampler: SamplerConfig
    ) -> list[bytes]:
        """Write drawn images as PNG files that carry their captions and settings."""
        shared = {**vars(sampler), "weights": self.opened.weights, "dtype": self.opened.dtype}
        return [
            _png_file(one, {"caption": image.caption, "seed": image.seed, **shared})
            for image, one in zip(images, drawn, strict=True)
        ]


def _png_file(image: Image.Image, facts: dict[str, object]) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=png_text(facts))
    return file.getvalue()


def batch_drawer(
    opened: OpenedModel, *, sampler: SamplerConfig, batch_size: int
) -> Callable[[Sequence[Asked]], list[bytes]]:
    """Make the function that draws up to batch_size images to PNG files."""
    shape = OneShape(opened, batch_size=batch_size)

    def draw(images: Sequence[Asked]) -> list[bytes]:
        drawn = shape.decoded(shape.codes(images, sampler=sampler))
        return shape.files(images, drawn, sampler=sampler)

    return draw
