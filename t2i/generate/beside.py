"""Several drawings in one folder: new images are numbered after the old, and the same drawing is resumed."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from t2i.files import read_json
from t2i.generate.claim import differing_settings

SETTINGS = "settings.json"
"""What the images of a folder were drawn with; a later drawing beside them has settings_NNNNN.json, by its first."""
RECORD = re.compile(r"settings(?:_(\d{5,}))?\.json")
Settings = dict[str, object]


def named_beside(
    texts: Sequence[str], *, out: Path, settings_of: Callable[[dict[str, str]], Settings]
) -> tuple[dict[str, str], str]:
    """Name images that are drawn into a folder which may hold others.

    Args:
        texts: captions.
        settings_of: the settings of a drawing, from its names and captions.

    Returns:
        name -> caption, and the file for the drawing's settings. If an earlier drawing is this one, they are its own.
    """
    ends = [0]
    for file in sorted(out.glob("settings*.json")):
        record = RECORD.fullmatch(file.name)
        if record is None:
            continue
        first, found = int(record[1] or 0), read_json(file)
        captions = _numbered(texts, first=first)
        if not differing_settings(found, settings_of(captions)):
            return captions, file.name
        # It may have been stopped before its last image, whose number is taken all the same.
        images = found.get("images")
        ends.append(first + (images if isinstance(images, int) else 0))
    ends += [int(path.stem) + 1 for path in out.glob("*.png") if path.stem.isdecimal()]
    first = max(ends)
    return _numbered(texts, first=first), f"settings_{first:05d}.json" if first else SETTINGS


def _numbered(texts: Sequence[str], *, first: int) -> dict[str, str]:
    return {f"{number:05d}": text for number, text in enumerate(texts, first)}
