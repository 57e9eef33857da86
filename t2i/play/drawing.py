"""Images that can be watched while they are drawn: codes in raster order, decoded after every row."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event, Lock

import torch
from PIL import Image
from torch import Tensor

from t2i.play.asked import Drawing
from t2i.play.following import check, follow
from t2i.runs.loading import OpenedModel
from t2i.serve.drawing import OneShape, cut_caption
from t2i.serve.waiting import Asked

NOT_YET = (236, 236, 240)
"""Colour of rows that are not drawn yet."""


@dataclass(frozen=True)
class Painter:
    """A model that the page draws with."""

    name: str
    shape: OneShape
    busy: Lock
    """Shared by all models of the page: together they would only take each other's time."""

    @property
    def opened(self) -> OpenedModel:
        """Return the model."""
        return self.shape.opened


@dataclass(frozen=True)
class Drawn:
    """How far a drawing has come."""

    images: list[Image.Image]
    """Those that were begun, in order; rows that are missing are grey."""
    files: list[bytes]
    """PNG files of those that are finished."""
    read: str
    """The part of the prompt that the model reads."""
    seed: int
    num_images: int
    passes: int
    """Passes of the model over its batches, so far."""
    all_passes: int
    seconds: float

    @property
    def is_finished(self) -> bool:
        """Whether every image is there."""
        return len(self.files) == self.num_images

    def status(self) -> str:
        """Say how far it is, in one line."""
        state = "Drawn" if self.is_finished else "Drawing"
        end = self.seed + self.num_images - 1
        seeds = f"seed {self.seed}" if self.num_images == 1 else f"seeds {self.seed} to {end}"
        return f"{state}: {self.passes} of {self.all_passes} passes, {self.seconds:.1f} s, {seeds}."


def draw_by_rows(painter: Painter, drawing: Drawing, *, given_up: Event) -> Iterator[Drawn]:
    """Draw, and yield the images after every row of codes; the last value is finished unless it was given up.

    An image depends on its seed and the settings alone, whatever else is drawn beside it.
    """
    return follow(
        lambda tell: _draw(painter, drawing, tell=tell, given_up=given_up),
        busy=painter.busy,
        given_up=given_up,
    )


def _draw(painter: Painter, drawing: Drawing, *, tell: Callable[[Drawn], None], given_up: Event) -> None:
    shape, start = painter.shape, time.monotonic()
    num_codes = painter.opened.model.config.codes_per_image
    side = math.isqrt(num_codes)
    asked = drawing.images()
    batches = [asked[at : at + shape.batch_size] for at in range(0, len(asked), shape.batch_size)]
    read = cut_caption(painter.opened, drawing.prompt)
    images: list[Image.Image] = []
    files: list[bytes] = []

    def say(begun: list[Image.Image], passes: int) -> None:
        seconds = time.monotonic() - start
        all_passes = num_codes * len(batches)
        tell(Drawn([*images, *begun], [*files], read, drawing.seed, len(asked), passes, all_passes, seconds))

    for index, batch in enumerate(batches):

        def on_code(codes: list[Tensor], index: int = index, batch: list[Asked] = batch) -> None:
            check(given_up)
            # The last row is said with the finished images.
            if len(codes) % side == 0 and len(codes) < num_codes:
                so_far = torch.stack(codes, dim=1)[: len(batch)]  # (B, k)
                say(unfinished(shape, so_far), index * num_codes + len(codes))

        drawn = shape.decoded(shape.codes(batch, sampler=drawing.sampler, on_code=on_code))
        images += drawn
        files += shape.files(batch, drawn, sampler=drawing.sampler)
        say([], (index + 1) * num_codes)


def unfinished(shape: OneShape, codes: Tensor) -> list[Image.Image]:
    """Decode the first k codes (B, k) of images; rows of codes that are not whole are grey."""
    opened = shape.opened
    num_codes = opened.model.config.codes_per_image
    side = math.isqrt(num_codes)
    filled = torch.nn.functional.pad(codes, (0, num_codes - codes.shape[1]))  # (B, K)
    top = codes.shape[1] // side * opened.needed_image_tokenizer().downscale
    images = shape.decoded(filled)
    for image in images:
        image.paste(NOT_YET, (0, top, image.width, image.height))
    return images
