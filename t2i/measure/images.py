"""Images in a fixed order, read lazily: a data set need not fit into memory."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from t2i.data.sources import UNREADABLE, Pair, decode_image
from t2i.errors import DataError
from t2i.generate.others.family import AnyTokenizer
from t2i.tokens.image import ImageTokenizer, centre_crop_resize, images_of, pixels_of

T = TypeVar("T")

READ_AHEAD = 64
"""Images decoded and cropped ahead, by threads."""


@dataclass(frozen=True)
class LazyImages:
    """uint8 RGB images (H, W, 3), each opened and cropped only when it is reached."""

    openers: Sequence[Callable[[], Image.Image]]
    crop: Callable[[Image.Image], Image.Image]

    def __len__(self) -> int:
        return len(self.openers)

    def __iter__(self) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter lock
            for batch in batches(self.openers, size=READ_AHEAD):
                yield from pool.map(self._read, batch)

    def sha256(self) -> str:
        """Hash all pixels, in order."""
        digest = hashlib.sha256()
        for image in self:
            digest.update(str(image.shape).encode())
            digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()

    def _read(self, opener: Callable[[], Image.Image]) -> np.ndarray:
        return np.asarray(self.crop(opener()))


@dataclass(frozen=True)
class Reconstructions:
    """The same images after a round trip through an image tokenizer."""

    images: LazyImages
    tokenizer: AnyTokenizer
    batch_size: int = 32

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[np.ndarray]:
        # The model can draw nothing better than this round trip, so its distance is the best that a model can reach.
        for batch in batches(self.images, size=self.batch_size):
            pixels = pixels_of(torch.from_numpy(np.stack(batch)))
            yield from images_of(self.tokenizer.decode(self.tokenizer.encode(pixels))).cpu().numpy()


def images_of_pairs(pairs: Sequence[Pair], *, size: int) -> LazyImages:
    """Line up pairs' images as the model sees them, size x size."""
    return LazyImages(
        [partial(_image_of, pair) for pair in pairs], crop=partial(centre_crop_resize, size=size)
    )


def _image_of(pair: Pair) -> Image.Image:
    return pair.open().image


def readable(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Skip pairs whose image is broken or refused by the source's filters, as preparation does."""
    # Opened here and again when read: which images are broken must be known before captions are counted.
    with ThreadPoolExecutor() as pool:
        for batch in batches(pairs, size=READ_AHEAD):
            yield from (pair for pair, opens in zip(batch, pool.map(_opens, batch), strict=True) if opens)


def _opens(pair: Pair) -> bool:
    try:
        pair.open()
    except UNREADABLE:
        return False
    return True


def encode(images: LazyImages, tokenizer: ImageTokenizer, *, batch_size: int = 32) -> np.ndarray:
    """Map images to codes (N, K)."""
    return np.concatenate(
        [
            tokenizer.encode(pixels_of(torch.from_numpy(np.stack(batch)))).cpu().numpy()
            for batch in batches(images, size=batch_size)
        ]
    )


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        DataError: the file cannot be read, or is no image.
    """
    try:
        return decode_image(path.read_bytes()).image
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as an image ({error}).") from error


def batches(items: Iterable[T], *, size: int) -> Iterator[list[T]]:
    """Cut items into lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
