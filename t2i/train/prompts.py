"""Prompts of your own, which a run draws from again and again, some with a real image to stand beside."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from t2i.data.sources.caption import LeftOut, read_captions
from t2i.data.sources.caption_list import LIST_COLUMNS, read_caption_list
from t2i.data.sources.image import decode_image
from t2i.data.sources.tables import TABLES, read_table_rows
from t2i.errors import DataError
from t2i.files import is_file

IMAGE_COLUMNS = ("image", "file_name")
MOST_PROMPTS = 64
"""Drawn as one batch, between two steps of a run that waits for them."""


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    text: str
    real: Image.Image | None
    """RGB, as large as it is stored."""


def read_prompts(file: Path) -> list[Prompt]:
    """Read a file of prompts.

    Raises:
        DataError: there is no such file, it has no prompt or too many, or an image that it names cannot be read.
    """
    if file.suffix in TABLES and is_file(file):
        prompts = [
            _of_row(row, file=file, number=number) for number, row in enumerate(read_table_rows(file), 1)
        ]
    else:
        prompts = [Prompt(listed.text, None) for listed in read_caption_list(file)]
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise DataError(
            f"train.sample_prompts: {file} has {len(prompts)} prompts; expected 1 to {MOST_PROMPTS}."
        )
    return prompts


def _of_row(row: dict[str, object], *, file: Path, number: int) -> Prompt:
    where, columns = f"{file}: row {number}", {str(name).strip().lower(): name for name in row}
    text = next((row[columns[name]] for name in LIST_COLUMNS if name in columns), None)
    if text in ("", None):
        found, wanted = ", ".join(map(str, row)), ", ".join(LIST_COLUMNS)
        raise DataError(f"{where} has the columns {found}; expected a prompt in one of {wanted}.")
    try:
        prompt = read_captions(text, takes_all=False, encoding="utf-8")[0].text
    except LeftOut as reason:
        raise DataError(f"{where} cannot be used: {reason}.") from reason
    name = next((row[columns[name]] for name in IMAGE_COLUMNS if name in columns), None)
    if not name:
        return Prompt(prompt, None)
    path = file.parent / str(name)
    try:
        return Prompt(prompt, decode_image(path.read_bytes()).image)
    except (OSError, ValueError, LeftOut) as error:
        raise DataError(f"{where} names the image {path}, which cannot be read: {error}.") from error
