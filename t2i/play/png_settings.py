"""The settings that a drawn PNG file carries, read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from t2i.config import SamplerConfig
from t2i.errors import UserError
from t2i.generate.image_files import IMAGE_SEED, PLACE
from t2i.play.asked import read_drawing
from t2i.serve.images_request import MOST_SEED

MOST_BYTES = 2**25
"""Of a file that is read."""


@dataclass(frozen=True)
class PngSettings:
    """What an image was drawn with."""

    prompt: str
    seed: int
    sampler: SamplerConfig
    notes: tuple[str, ...]
    """What may keep the same settings from drawing the same image again."""


def read_png_settings(path: Path, *, weights: str, dtype: str = "float32") -> PngSettings:
    """Read a PNG file of this page, of `t2i sample` or of `t2i serve`.

    Args:
        weights: hash of the model's weights here.
        dtype: of the model's weights in memory here.

    Raises:
        UserError: it is no PNG file, or carries no settings.
    """
    facts = _facts(path)
    missing = [key for key in ("caption", "seed", *vars(SamplerConfig())) if key not in facts]
    if missing:
        raise UserError(
            f"{path.name:.80} carries no settings of a drawing: {', '.join(missing)} missing in its PNG text."
            " Programs that edit images leave it out."
        )
    seed = _seed_of(facts)
    drawing = read_drawing(
        facts["caption"],
        1,
        str(seed),
        *(_number(facts[key], key=key) for key in vars(SamplerConfig())),
        most_images=1,
    )
    notes = tuple(_notes(facts, weights=weights, dtype=dtype))
    return PngSettings(drawing.prompt, drawing.seed, drawing.sampler, notes)


def _seed_of(facts: Mapping[str, str]) -> int:
    if IMAGE_SEED in facts:
        return _whole(facts[IMAGE_SEED], key=IMAGE_SEED)
    # `t2i sample` writes the seed of its first image.
    return _whole(facts["seed"], key="seed") + _whole(facts.get(PLACE, "0"), key=PLACE)


def _notes(facts: Mapping[str, str], *, weights: str, dtype: str) -> list[str]:
    notes = []
    if facts.get("weights") != weights:
        notes.append("It was drawn by other weights, so the same settings draw another image here.")
    # `t2i sample`, which alone writes its batch size, says no float32; older files of the others say no type.
    if (drawn_in := facts.get("dtype", "float32" if "batch_size" in facts else dtype)) != dtype:
        notes.append(
            f"It was drawn in {drawn_in}, here it is {dtype}: where codes are nearly tied, rounding decides."
        )
    if facts.get("best_of", "1") != "1" and IMAGE_SEED not in facts:
        notes.append("It is the best of several candidates; this is the seed of the first.")
    if "batch_size" in facts and PLACE not in facts:
        notes.append("The seed is that of the first image of its drawing.")
    return notes


def _facts(path: Path) -> Mapping[str, str]:
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path.name:.80} is larger than {MOST_BYTES // 2**20} MiB.")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            # Text may stand behind the pixels, so that all of the file is read.
            return dict(image.text)  # type: ignore[attr-defined]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises each
        raise UserError(f"{path.name:.80} cannot be read as a PNG file.") from error


def _whole(text: str, *, key: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_SEED))):
        raise UserError(f"{key} is {text!r:.80} in the PNG file; expected a whole number.")
    return int(text)


def _number(text: str, *, key: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{key} is {text!r:.80} in the PNG file; expected a number.") from None
