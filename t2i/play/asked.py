"""What somebody asks the page to draw, checked before the model sees it."""

import secrets
from dataclasses import dataclass

from t2i.config import SamplerConfig
from t2i.errors import UserError
from t2i.files import valid_text
from t2i.serve.images_request import MOST_CHARACTERS, MOST_SEED, RANDOM_SEEDS
from t2i.serve.waiting import Asked


@dataclass(frozen=True)
class Drawing:
    """Images of one prompt."""

    prompt: str
    num_images: int
    seed: int
    """Of the first image; image i has seed + i."""
    sampler: SamplerConfig

    def images(self) -> list[Asked]:
        """List the images, each by its own seed."""
        return [Asked(self.prompt, self.seed + index) for index in range(self.num_images)]


def read_drawing(
    prompt: object,
    num_images: object,
    seed: object,
    guidance_scale: object,
    temperature: object,
    top_k: object,
    top_p: object,
    *,
    most_images: int,
) -> Drawing:
    """Read the fields of the page, in their order there.

    Args:
        seed: a text; an empty one has a seed chosen.
        most_images: of one drawing.

    Raises:
        UserError: a field cannot be drawn by.
    """
    count = _whole("number of images", num_images, least=1, most=most_images)
    first = secrets.randbelow(RANDOM_SEEDS) if seed == "" else _seed(seed, most=MOST_SEED - count)
    sampler = SamplerConfig(
        guidance_scale=_number("guidance", guidance_scale),
        temperature=_number("temperature", temperature),
        top_k=_whole("top-k", top_k, least=0, most=1_000_000_000),
        top_p=_number("top-p", top_p),
    )
    return Drawing(read_text("prompt", prompt), count, first, sampler)


def read_text(name: str, text: object) -> str:
    """Read a field of text.

    Raises:
        UserError: it is no text, or a longer one than is read.
    """
    if not isinstance(text, str):
        raise UserError(f"The {name} is {text!r:.100}; expected a text.")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"The {name} has {len(text):,} characters; expected at most {MOST_CHARACTERS:,}.")
    # Half of a pair of surrogates is no text, though JSON can spell it.
    return valid_text(text)


def _seed(text: object, *, most: int) -> int:
    # By its digits: int() takes other ways to write a number too, and is slow at long ones.
    is_number = isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) <= len(str(most))
    if not is_number or int(str(text)) > most:
        raise UserError(f"The seed is {text!r:.100}; expected a whole number from 0 to {most:,}, or nothing.")
    return int(str(text))


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"The {name} is {value!r:.100}; expected a number.")
    return float(value)


def _whole(name: str, value: object, *, least: int, most: int) -> int:
    number = _number(name, value)
    # Before int(), which nan and infinity do not survive.
    if not least <= number <= most or number != int(number):
        raise UserError(f"The {name} is {value!r:.100}; expected a whole number from {least:,} to {most:,}.")
    return int(number)
