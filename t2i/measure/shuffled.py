"""Captions of other images: the control of every measure that asks whether captions matter."""

import operator
from collections.abc import Hashable, Sequence


def unrelated(
    *facts: Sequence[Hashable], shift: int, alike: Sequence[Hashable] | None = None
) -> list[int] | None:
    """Choose for each of N items another that differs from it in every fact: N indices.

    The item `shift` places further is taken where it will do, else the next one after it.

    Args:
        facts: N values each, such as the captions and the images that they are of.
        alike: N values in which the two must not differ, such as the style; None for none.

    Returns:
        None if an item has no such other.
    """
    # An image under a second caption of its own, or under that of another which reads the same, is a matched pair. As
    # a control it would say that captions hardly matter.
    items = list(zip(*facts, strict=True))
    places = []
    for place, item in enumerate(items):
        further = (at % len(items) for at in range(place + shift, place + shift + len(items)))
        kind = alike[place] if alike is not None else None
        other = next(
            (
                at
                for at in further
                if (alike is None or alike[at] == kind) and all(map(operator.ne, item, items[at]))
            ),
            None,
        )
        if other is None:
            return None
        places.append(other)
    return places
