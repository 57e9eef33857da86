"""What the image tokenizer makes of a source's pictures: a stored proof, and a preview before anything is written."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from t2i.config import PrepareConfig
from t2i.data.decode import decode
from t2i.data.shards.reader import RECONSTRUCTIONS
from t2i.data.sources import Pair, Source, Unit
from t2i.tokens.image import ROUND_TRIP, ImageTokenizer, code_agreement, pictures_of, to_pixels

NUM_ROUND_TRIP, NUM_COMPARED = 8, 32
"""Pictures that are stored; pictures whose codes are compared with float32's."""


def sample_pictures(source: Source, *, config: PrepareConfig, num: int) -> list[tuple[Pair, Image.Image]]:
    """Read the first usable pictures of units that are evenly spread over the source."""
    units = source.units(config.unit_pairs)
    spread = units[:: max(1, len(units) // num)]
    quota = -(-num // max(1, len(spread)))
    found: dict[str, tuple[Pair, Image.Image]] = {}
    for unit in (*spread, *units):
        if len(found) >= num:
            break
        found.update({pair.key: (pair, image) for pair, image in islice(_usable(unit, config), quota)})
    return list(found.values())[:num]


def write_round_trip(part: Path, source: Source, tokenizer: ImageTokenizer, config: PrepareConfig) -> float:
    """Store eight pictures with codes and reconstructions in float32; return the share of its codes equal to them."""
    sampled = sample_pictures(source, config=config, num=NUM_COMPARED)
    batches = to_pixels([image for _, image in sampled]).split(config.batch_size)
    exact = ImageTokenizer(tokenizer.model, folder=tokenizer.folder, device=tokenizer.model.device)
    pixels = torch.cat(batches)[:: max(1, len(sampled) // NUM_ROUND_TRIP)][:NUM_ROUND_TRIP]
    codes = exact.encode(pixels).cpu()
    pictures, decoded = pictures_of(pixels), pictures_of(exact.decode(codes)).cpu()
    save_file(
        {"pictures": pictures.contiguous(), "codes": codes, "decoded": decoded.contiguous()},
        part / ROUND_TRIP,
    )
    rows = torch.stack([pictures, decoded])  # (2, N, H, W, 3)
    grid = rows.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)
    Image.fromarray(grid.numpy()).save(part / RECONSTRUCTIONS)
    if tokenizer.dtype == exact.dtype:
        return 1.0
    agreed = [code_agreement(tokenizer, exact, batch) * len(batch) for batch in batches]
    return sum(agreed) / len(sampled)


def _usable(unit: Unit, config: PrepareConfig) -> Iterator[tuple[Pair, Image.Image]]:
    for pair in unit(Counter()):
        decoded = decode(pair, config=config)
        if decoded.pictures:
            yield pair, decoded.pictures[0]
