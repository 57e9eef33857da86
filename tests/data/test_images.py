"""How strangers' images become 8-bit RGB: what is kept, what is said to have been changed, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from t2i.data.sources import decode_image, image

RAMP = np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16)
BLACK, RED = (Image.new("RGB", (12, 8), colour) for colour in ("black", "red"))


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def deep_png(colour_type, values, transparent=b""):
    """Write 16 bits per channel, which Pillow cannot write in colour."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)),
        *([(b"tRNS", transparent)] if transparent else []),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


DEEP = {
    "grey PNG": encoded(Image.fromarray(RAMP), "PNG"),
    "grey TIFF": encoded(Image.fromarray(RAMP), "TIFF"),
    "colour PNG": deep_png(2, np.stack([RAMP] * 3, -1)),
    "grey and alpha PNG": deep_png(4, np.stack([RAMP, np.full_like(RAMP, 65535)], -1)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_sixteen_bits_keep_the_high_byte_in_grey_as_in_colour(kind):
    opened = decode_image(DEEP[kind])
    assert (np.asarray(opened.image) == (RAMP >> 8)[..., None]).all()
    assert opened.changed == (image.SIXTEEN_BITS,)


def test_a_transparent_value_of_sixteen_bits_becomes_white():
    for content in (
        deep_png(0, RAMP, struct.pack(">H", RAMP[-1, -1])),
        deep_png(2, np.stack([RAMP] * 3, -1), struct.pack(">3H", 0, 0, 0)),
    ):
        assert np.asarray(decode_image(content).image)[[0, -1], [0, -1]].max() == 255


def test_pixels_without_a_stated_range_are_refused():
    for values in (RAMP.astype(np.float32), RAMP.astype(np.int32)):
        with pytest.raises(ValueError, match="pixels of 32 bits, whose range no header states"):
            decode_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_of_several_frames_the_first_is_used_and_said_to_be(kind):
    assert decode_image(encoded(BLACK, kind)).changed == ()
    opened = decode_image(encoded(BLACK, kind, save_all=True, append_images=[RED]))
    assert np.asarray(opened.image).max() < 16
    # The second image of an MPO, which phones write, is its depth or brightness.
    assert opened.changed == (() if kind == "MPO" else (image.FIRST_FRAME,))


def test_a_broken_second_frame_does_not_take_the_first():
    content = encoded(BLACK, "GIF", save_all=True, append_images=[RED])
    assert decode_image(content[:-20]).image.size == BLACK.size


def test_transparency_becomes_white():
    clear = RED.convert("P")
    for content in (
        encoded(Image.new("RGBA", (12, 8), (255, 0, 0, 0)), "PNG"),
        encoded(Image.new("LA", (12, 8), (9, 0)), "PNG"),
        encoded(clear, "PNG", transparency=clear.getpixel((0, 0))),
        encoded(clear, "GIF", transparency=clear.getpixel((0, 0))),
    ):
        opened = decode_image(content)
        assert (opened.image.mode, opened.image.getpixel((0, 0)), opened.changed) == (
            "RGB",
            (255, 255, 255),
            (),
        )


def test_cmyk_becomes_rgb_and_is_counted():
    opened = decode_image(encoded(RED.convert("CMYK"), "JPEG", quality=100))
    assert opened.image.getpixel((5, 5)) == pytest.approx((255, 0, 0), abs=2)
    assert opened.changed == (image.CMYK,)


def test_other_formats_and_huge_images_are_refused(monkeypatch):
    with pytest.raises(OSError, match="cannot identify one of JPEG, PNG"):
        decode_image(encoded(RED, "TGA"))
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 95)
    for kind in ("PNG", "BMP", "TIFF", "GIF"):
        with pytest.raises(ValueError, match="12 x 8 pixels exceed the limit of 95"):
            decode_image(encoded(RED, kind))
