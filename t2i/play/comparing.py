"""Two models that draw the same prompt by the same seeds."""

from collections.abc import Iterator, Sequence
from threading import Event

from t2i.play.asked import Drawing
from t2i.play.drawing import Drawn, Painter, draw_by_rows


def draw_side_by_side(
    painters: Sequence[Painter], drawing: Drawing, *, given_up: Event
) -> Iterator[list[Drawn | None]]:
    """Draw by one model after the other; yield how far each has come, None for one that has not begun."""
    found: list[Drawn | None] = [None] * len(painters)
    for place, painter in enumerate(painters):
        if given_up.is_set():
            return
        for drawn in draw_by_rows(painter, drawing, given_up=given_up):
            found[place] = drawn
            yield [*found]
