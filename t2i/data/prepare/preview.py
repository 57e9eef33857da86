"""Draw images beside their captions on one sheet: of a source before it is prepared, or of shards."""

import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from t2i.config import PrepareConfig
from t2i.data.prepare.decode import decode
from t2i.data.shards.accounts import most_frequent
from t2i.data.shards.manifest import IMAGE_TOKENIZER, RECONSTRUCTIONS, TEXT_TOKENIZER
from t2i.data.shards.reader import read_split
from t2i.data.sources import Pair, Source, Tally
from t2i.errors import DataError, UserError
from t2i.files import write_bytes_whole
from t2i.tokens.image import ROUND_TRIP, ImageTokenizer, code_agreement, images_of, to_pixels
from t2i.tokens.text import TextTokenizer

TEXT_WIDTH, TEXT_COLUMNS, MARGIN = 420, 56, 8
"""Width of a caption in pixels and in characters; pixels between the parts of a sheet."""

SHOWN_CODES = 12
DRAWN_BY = "a sheet of t2i"
"""Written into a sheet's file, so that only sheets are overwritten."""

NUM_ROUND_TRIP, NUM_COMPARED = 8, 32
"""Images that are stored; images whose codes are compared with those of float32."""


@dataclass(frozen=True)
class Shown:
    """One row of a sheet."""

    images: list[Image.Image]
    caption: str
    facts: str
    """Key, ids and codes, to be printed."""


@dataclass(frozen=True)
class LookedAt:
    """What was found while images were looked for; the rest of the source is not counted."""

    tally: Tally = field(default_factory=Tally)
    broken: Counter[str] = field(default_factory=Counter)
    """Broken images by reason."""


def preview(
    source: Source,
    *,
    num: int,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    config: PrepareConfig,
    looked: LookedAt,
) -> list[Shown]:
    """Show usable images as the model will see them: the crop, its reconstruction, and the caption's ids.

    Args:
        looked: counts what was found on the way.

    Raises:
        DataError: no image of the source can be used.
    """
    sampled = sample_images(source, config=config, num=num, looked=looked)
    if not sampled:
        reasons = "; ".join(most_frequent(looked.tally.left_out + looked.broken)) or "it has none"
        raise DataError(f"no image of --source {source.name} can be used: {reasons}.")
    codes = image_tokenizer.encode(to_pixels([image for _, image in sampled])).cpu()
    decoded = decode_codes(codes, image_tokenizer)
    return [
        Shown(
            [image, back],
            pair.caption,
            _facts(pair.key, pair.split, text_tokenizer.encode(pair.caption).tolist(), row.tolist()),
        )
        for (pair, image), back, row in zip(sampled, decoded, codes, strict=True)
    ]


def show_shards(folder: Path, *, split: str = "train", num: int) -> list[Shown]:
    """Decode evenly spread samples of a shard folder: their images, and their captions from the ids."""
    image_tokenizer = ImageTokenizer.load(folder / IMAGE_TOKENIZER)
    text_tokenizer = TextTokenizer.load(folder / TEXT_TOKENIZER)
    samples = list(read_split(folder, split, num_samples=num))
    codes = torch.from_numpy(np.stack([sample["codes"] for sample in samples]).astype("int64"))  # (B, K)
    shown = []
    for sample, image in zip(samples, decode_codes(codes, image_tokenizer), strict=True):
        ids = sample["caption_ids"].astype("int64")
        # From the ids, not the stored text: the model reads the ids.
        caption = text_tokenizer.decode(torch.from_numpy(ids))
        facts = _facts(sample["key"], split, ids.tolist(), sample["codes"].tolist())
        shown.append(Shown([image], caption, facts))
    return shown


def decode_codes(codes: torch.Tensor, tokenizer: ImageTokenizer) -> list[Image.Image]:
    """Decode codes (B, K) to images."""
    return [Image.fromarray(one) for one in images_of(tokenizer.decode(codes)).cpu().numpy()]


def draw_sheet(rows: list[Shown]) -> Image.Image:
    """Draw one row per sample: its images, then its caption."""
    side = max(96, rows[0].images[0].height)
    left = MARGIN + len(rows[0].images) * (side + MARGIN)
    sheet = Image.new("RGB", (left + TEXT_WIDTH, MARGIN + len(rows) * (side + MARGIN)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, row in enumerate(rows):
        top = MARGIN + number * (side + MARGIN)
        for place, image in enumerate(row.images):
            enlarged = image.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + place * (side + MARGIN), top))
        lines = textwrap.wrap(row.caption, TEXT_COLUMNS)[: side // 18]
        draw.multiline_text((left, top), "\n".join(lines), fill="black", font=font, spacing=4)
    return sheet


def check_sheet(path: Path) -> None:
    """Check that a sheet may be written to this file.

    Raises:
        UserError: the file is no .png, its folder does not exist, or it exists and is not a sheet.
    """
    if path.suffix != ".png":
        raise UserError(f"--sheet is {path}; expected a name that ends in .png.")
    if not path.parent.is_dir():
        raise UserError(f"--sheet is {path}, but there is no folder {path.parent}.")
    if not path.exists():
        return
    try:
        software = Image.open(path, formats=["PNG"]).info.get("Software")
    except (UnidentifiedImageError, OSError):
        software = None
    if software != DRAWN_BY:
        raise UserError(f"--sheet {path} exists and is not a sheet of t2i; choose another name.")


def save_sheet(rows: list[Shown], path: Path) -> None:
    """Draw rows into a file that check_sheet accepted; an older sheet is overwritten."""
    info = PngInfo()
    info.add_text("Software", DRAWN_BY)
    draw_sheet(rows).save(path, pnginfo=info)


def _facts(key: str, split: str, ids: list[int], codes: list[int]) -> str:
    some = " ".join(map(str, codes[:SHOWN_CODES]))
    return f"{key} [{split}]\n  {len(ids)} ids: {' '.join(map(str, ids))}\n  {len(codes)} codes: {some} ..."


def sample_images(
    source: Source, *, config: PrepareConfig, num: int, looked: LookedAt
) -> list[tuple[Pair, Image.Image]]:
    """Read usable images that are evenly spread over the source's units, and over each of these."""
    # Spread, because sources are often sorted: the first images of all would show one kind of them.
    units = source.units(config.unit_pairs)
    spread = units[:: max(1, len(units) // num)]
    quota = -(-num // max(1, len(spread)))
    found: dict[str, tuple[Pair, Image.Image]] = {}
    # All units come last, for sources whose spread units have too few usable images.
    plan = [(unit, quota, looked) for unit in spread] + [(unit, num, LookedAt()) for unit in units]
    for unit, most, counted in plan:
        if len(found) >= num:
            break
        pairs: Iterable[Pair] = unit(counted.tally)
        if not source.is_streamed:
            pairs = _spread_first(list(pairs), num=most)
        usable = _usable((pair for pair in pairs if pair.key not in found), config, counted)
        found.update({pair.key: (pair, image) for pair, image in islice(usable, most)})
    return list(found.values())[:num]


def _spread_first(pairs: list[Pair], *, num: int) -> list[Pair]:
    """Put `num` evenly spread pairs before the others."""
    step = max(1, len(pairs) // num)
    order = sorted(range(len(pairs)), key=lambda place: place % step > 0)
    return [pairs[place] for place in order]


def write_round_trip(part: Path, source: Source, tokenizer: ImageTokenizer, config: PrepareConfig) -> float:
    """Store eight images with their codes and reconstructions in float32.

    Returns:
        the share of the tokenizer's codes that equal those of float32.
    """
    sampled = sample_images(source, config=config, num=NUM_COMPARED, looked=LookedAt())
    batches = to_pixels([image for _, image in sampled]).split(config.batch_size)
    # In float32, so that a run on another device can be checked against these codes.
    exact = ImageTokenizer(tokenizer.model, folder=tokenizer.folder, device=tokenizer.model.device)
    pixels = torch.cat(batches)[:: max(1, len(sampled) // NUM_ROUND_TRIP)][:NUM_ROUND_TRIP]
    codes = exact.encode(pixels).cpu()
    images, decoded = images_of(pixels), images_of(exact.decode(codes)).cpu()
    tensors = {"pictures": images.contiguous(), "codes": codes, "decoded": decoded.contiguous()}
    # Not by save_file: its files cannot be read by other users, and it reports a full disk as an error of its own.
    write_bytes_whole(part / ROUND_TRIP, save(tensors))
    rows = torch.stack([images, decoded])  # (2, N, H, W, 3)
    grid = rows.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)
    buffer = io.BytesIO()
    Image.fromarray(grid.numpy()).save(buffer, "PNG")
    write_bytes_whole(part / RECONSTRUCTIONS, buffer.getvalue())
    if tokenizer.dtype == exact.dtype:
        return 1.0
    agreed = [code_agreement(tokenizer, exact, batch) * len(batch) for batch in batches]
    return sum(agreed) / len(sampled)


def _usable(
    pairs: Iterable[Pair], config: PrepareConfig, looked: LookedAt
) -> Iterator[tuple[Pair, Image.Image]]:
    for pair in pairs:
        decoded = decode(pair, config=config)
        if decoded.left_out:
            looked.tally.left_out[decoded.left_out] += 1
        if decoded.broken:
            looked.broken[decoded.broken] += 1
        if decoded.images:
            looked.tally.changed.update((*pair.changed, *decoded.changed))
            yield pair, decoded.images[0]
