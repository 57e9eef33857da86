"""Cells of an image column: bytes, Hugging Face's struct of bytes and path, or what people have in their place."""

from t2i.data.sources.caption import LeftOut
from t2i.data.sources.image import OpenedImage, decode_image
from t2i.data.sources.tables import is_url

FIRST_IMAGE = "the first of several images of a row"


def open_cell(cell: object) -> OpenedImage:
    """Decode the image of a cell; of a list, the first.

    Raises:
        LeftOut: the cell is empty, or holds a path, an address or something else that is not bytes.
        OSError: the bytes are not an image.
        ValueError: the same.
    """
    if isinstance(cell, list):
        if len(cell) == 1 or (cell and not isinstance(cell[0], bytes | dict | str)):
            return open_cell(cell[0])
        if cell:
            opened = open_cell(cell[0])
            return OpenedImage(opened.image, (*opened.changed, FIRST_IMAGE))
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(data, bytes) and data:
        return decode_image(data)
    if not data:
        path = cell.get("path") if isinstance(cell, dict) else None
        raise LeftOut(_instead(path) if path else "a row without an image")
    raise LeftOut(_instead(data))


def _instead(value: object) -> str:
    """Say what a cell holds in place of bytes, and what helps."""
    if is_url(value):
        return "an address in place of image bytes; images are not downloaded (img2dataset does that)"
    if isinstance(value, str):
        return "a path in place of image bytes; write the bytes into the table, or list the paths in a .csv"
    return f"an image of type {type(value).__name__}, not bytes; --image-key names another column"
