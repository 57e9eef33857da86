"""Icons drawn from the SVG bodies of strangers."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

import resvg_py
from PIL import Image

from t2i.data.sources.caption import LeftOut
from t2i.data.sources.image import OpenedImage

USUAL_SIDE = 16.0
"""Width and height where neither the icon nor its set states them."""

MAX_DEPTH = 100
"""Levels of an SVG, with those of what its elements refer to. A few hundred overflow the renderer's stack, which ends
the process."""

MAX_OCTAVES = 10
MAX_RADIUS = 0.05
"""Most work of a filter: octaves of noise, and the radius of a thickening relative to the icon's side. Twice as much of
either shows nothing more, and takes minutes."""

REFERENCE = re.compile(r"#([^\s\"')]+)")

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    ' viewBox="{left} {top} {side} {side}"><g transform="{transform}">{body}</g></svg>'
)


@dataclass(frozen=True)
class Icon:
    """One icon: its SVG body, the box it is drawn in, and how that is turned."""

    body: str
    left: float = 0.0
    top: float = 0.0
    width: float = USUAL_SIDE
    height: float = USUAL_SIDE
    quarter_turns: int = 0
    """Clockwise, after the flips."""
    is_flipped: bool = False
    """Left and right are exchanged."""
    is_upside_down: bool = False
    """Top and bottom are exchanged."""


def open_icon(icon: Icon, *, size: int) -> OpenedImage:
    """Draw one icon as a source's image of size x size pixels.

    Raises:
        LeftOut: it draws nothing.
        ValueError: its SVG is broken.
    """
    image = draw_icon(icon, size=size)
    if image.convert("L").getextrema() == (255, 255):
        raise LeftOut("an icon that draws nothing on white")
    return OpenedImage(image)


def draw_icon(icon: Icon, *, size: int) -> Image.Image:
    """Draw an icon in the middle of a white square, size x size pixels; `currentColor` is black.

    Raises:
        ValueError: its SVG is broken, or takes more work than an icon may.
    """
    # A square, whatever the icon's sides: the centre crop of a wide one would cut off its ends.
    side = max(icon.width, icon.height)
    x, y = icon.left + icon.width / 2, icon.top + icon.height / 2
    across, down = (-1 if icon.is_flipped else 1), (-1 if icon.is_upside_down else 1)
    turned = (
        f"rotate({90 * icon.quarter_turns} {x} {y}) translate({x} {y})"
        f" scale({across} {down}) translate({-x} {-y})"
    )
    svg = SVG.format(left=x - side / 2, top=y - side / 2, side=side, transform=turned, body=icon.body)
    _check_work(svg, side=side)
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png)), formats=["PNG"]).convert("RGB")


def _check_work(svg: str, *, side: float) -> None:
    """Refuse what would end the process or never end.

    Raises:
        ValueError: the SVG is no XML, nests too deep, or has a filter that takes too long.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"its SVG is no XML ({error})") from error
    by_id = {name: one for one in root.iter() if (name := one.get("id"))}
    heights: dict[ElementTree.Element, int] = {}

    def height(one: ElementTree.Element, depth: int) -> int:
        if depth <= MAX_DEPTH and one not in heights:
            heights[one] = 0  # of a circle of references, which the renderer leaves out
            heights[one] = 1 + max((height(inner, depth + 1) for inner in _inner(one, by_id)), default=0)
        if depth + heights.get(one, 1) > MAX_DEPTH:
            raise ValueError(f"its SVG has more than {MAX_DEPTH} levels")
        return heights[one]

    height(root, 0)
    for key, most in (("numOctaves", MAX_OCTAVES), ("radius", MAX_RADIUS * side)):
        for one in root.iter():
            # A filter's radius may be two numbers; what is no number draws nothing.
            if max(map(_number, one.get(key, "").split()), default=0) > most:
                raise ValueError(
                    f"its SVG has a filter of {key} {one.get(key):.20}; expected at most {most:g}"
                )


def _inner(one: ElementTree.Element, by_id: dict[str, ElementTree.Element]) -> Iterator[ElementTree.Element]:
    """List an element's children, and the elements that it refers to."""
    yield from one
    for value in one.attrib.values():
        yield from (by_id[name] for name in REFERENCE.findall(value) if name in by_id)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
