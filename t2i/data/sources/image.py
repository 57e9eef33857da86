"""Images of strangers: decoded from bytes to 8-bit RGB, by a few named formats, with a word on what was changed."""

import errno
import io
import re
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from t2i.data.sources.caption import LeftOut

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Pillow would also try FITS, PDF or EPS on a file named .jpg."""
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".jfif", ".jpe", ".gif", ".bmp", ".tif", ".tiff", ".avif"
)  # fmt: skip
"""Endings of images; of several members of one key in a tar, the first by this order is used."""
MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|GIF8|BM....\0{4}|....ftypavi[fs]", re.DOTALL)
"""How images begin. Without TIFF, as which cameras' raw files begin too: Pillow would read their thumbnails."""
NEVER_IMAGES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
MAX_IMAGE_PIXELS = 64_000_000
"""Larger images are refused as decompression bombs: a few bytes can claim billions of pixels."""

MAX_IMAGE_BYTES = 2**29
"""Larger files are left out, unread."""

UNREADABLE = (OSError, ValueError)
"""What decoding a broken image may raise."""
OF_THE_DISK = frozenset(
    (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
)
"""Errors of a disk or a machine, and not of a file: an image that they hide may be fine at the next try."""
PILLOWS_OWN = (
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise, beside UNREADABLE, for some broken files; they have no common base class."""

SIXTEEN_BITS = "16 bits per channel became 8"
FIRST_FRAME = "the first of several frames or pages"
CMYK = "CMYK became RGB without its colour profile"


@dataclass(frozen=True)
class OpenedImage:
    """A decoded image."""

    image: Image.Image
    """RGB, 8 bits per channel."""
    changed: tuple[str, ...] = ()
    """What was lost or guessed on the way, for Tally.changed."""


def is_image_file(path: Path) -> bool:
    """Tell whether a file is one to be decoded: by its ending, else by its first bytes."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in NEVER_IMAGES:
        return suffix in IMAGE_SUFFIXES
    try:
        with path.open("rb") as file:
            return MAGIC.match(file.read(16)) is not None
    except OSError as error:
        if error.errno in OF_THE_DISK:
            raise
        return False


def read_image_file(path: Path) -> OpenedImage:
    """Decode an image file.

    Raises:
        LeftOut: it is too large to be one.
    """
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise LeftOut(f"a file over {MAX_IMAGE_BYTES} bytes")
    return decode_image(path.read_bytes())


def decode_image(data: bytes) -> OpenedImage:
    """Decode an image of one of IMAGE_FORMATS to RGB, with EXIF rotation applied, on white, the first frame.

    Raises:
        ValueError: more than MAX_IMAGE_PIXELS pixels, pixels without a stated range, or broken bytes.
        OSError: another format, or broken bytes.
    """
    try:
        return _decode(data)
    except UnidentifiedImageError as error:
        # Pillow's own text holds an address in memory, which would differ from run to run in broken.jsonl.
        raise UnidentifiedImageError(f"cannot identify one of {', '.join(IMAGE_FORMATS)}") from error
    except PILLOWS_OWN as error:
        raise ValueError(f"a broken image ({type(error).__name__}: {error})") from error


def _decode(data: bytes) -> OpenedImage:
    file = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    # By the header, before any pixel is decoded.
    if file.width * file.height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{file.width} x {file.height} pixels exceed the limit of {MAX_IMAGE_PIXELS}")
    if file.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose range no header states; expected 8 or 16 bits")
    # Pillow reduces 16-bit colour while it decodes and says so nowhere but in the name of the raw mode. (In a BMP,
    # BGR;16 is a whole pixel of 16 bits.)
    is_deep = file.format in ("PNG", "TIFF") and ";16" in str(file.tile)
    changed = [SIXTEEN_BITS] if is_deep else []
    if file.mode == "CMYK":
        changed.append(CMYK)
    image: Image.Image = ImageOps.exif_transpose(file)
    if is_deep:
        image = _in_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    # After the pixels: a file whose second frame is broken still has its first. An MPO's others are a photo's depth or
    # brightness, not its content.
    with suppress(*UNREADABLE, *PILLOWS_OWN):
        if getattr(file, "is_animated", False) and file.format != "MPO":
            changed.append(FIRST_FRAME)
    return OpenedImage(image, tuple(changed))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Keep the high byte of grey, as Pillow does for colour, and of the value that stands for transparency."""
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if clear is not None:
        image.info["transparency"] = (
            clear >> 8 if isinstance(clear, int) else tuple(one >> 8 for one in clear)
        )
    return image
