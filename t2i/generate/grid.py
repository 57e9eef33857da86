"""Several images on one sheet."""

from collections.abc import Iterator, Sequence

from PIL import Image


def grid(images: Sequence[Image.Image], *, columns: int) -> Image.Image:
    """Lay images of one size out in rows, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for image, (x, y) in zip(images, _places(columns), strict=False):
        sheet.paste(image, (x * width, y * height))
    return sheet


def _places(columns: int) -> Iterator[tuple[int, int]]:
    y = 0
    while True:
        yield from ((x, y) for x in range(columns))
        y += 1
