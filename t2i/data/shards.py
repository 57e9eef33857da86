"""MDS shards and their manifest: encode once, check, read.

A shard folder holds train/, heldout/ and combinations/ (MosaicML Streaming's MDS), manifest.json, broken.jsonl
(pictures that could not be read, with the reason) and roundtrip.safetensors with reconstructions.png (eight pictures,
their codes and what the tokenizer makes of them).
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from streaming import MDSWriter
from streaming.base.format import reader_from_json
from streaming.base.util import merge_index
from tqdm import tqdm

from t2i.config import PrepareConfig
from t2i.data.floors import code_floors
from t2i.data.hashing import hash_uniform
from t2i.data.pairs import SPLITS, Pair, Source
from t2i.errors import DataError, UserError
from t2i.tokens.image import (
    ImageTokenizer,
    centre_crop_resize,
    pictures_of,
    pixels_of,
    shifted,
    to_pixels,
)
from t2i.tokens.text import TextTokenizer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST, BROKEN, ROUND_TRIP, RECONSTRUCTIONS = (
    "manifest.json",
    "broken.jsonl",
    "roundtrip.safetensors",
    "reconstructions.png",
)
NUM_ROUND_TRIP = 8


def prepare(
    source: Source,
    *,
    out: Path,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    config: PrepareConfig,
) -> dict[str, Any]:
    """Encode a source into shards at `out` and return the manifest; a finished or half-made `out` is gone on with.

    Raises:
        UserError: `out` was begun with other arguments.
        DataError: no picture of the source could be read.
    """
    arguments = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "heldout_share": source.heldout_share,
        "image_size": config.image_size,
        "views": config.views,
        "unit_pairs": config.unit_pairs,
        "image_tokenizer": image_tokenizer.fingerprint(),
        "text_tokenizer": text_tokenizer.fingerprint(),
    }
    if out.exists():
        manifest = read_manifest(out)
        _same_arguments(out, manifest["arguments"], arguments)
        logger.info("%s is already prepared", out)
        return manifest
    part = out.with_name(out.name + ".part")
    _begin(part, arguments)
    units = [
        source.pairs[start : start + config.unit_pairs]
        for start in range(0, len(source.pairs), config.unit_pairs)
    ]
    bar = tqdm(total=len(source.pairs), unit="pair", desc="encode")
    for index, pairs in enumerate(units):
        if not _unit_file(part, index).exists():
            _write_unit(part, index, pairs, image_tokenizer, text_tokenizer, config)
        bar.update(len(pairs))
    bar.close()
    manifest = _finish(part, len(units), source, image_tokenizer, text_tokenizer, config, arguments)
    part.rename(out)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a shard folder's manifest.

    Raises:
        DataError: there is none, or another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is no shard folder: it has no {MANIFEST}. launchers/prepare.py makes one.")
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format {manifest.get('format_version')}; this version reads {FORMAT_VERSION}."
        )
    return manifest


def read_split(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Read the samples of one split in their order: key, caption, caption_ids, codes."""
    index = folder / split / "index.json"
    if not index.is_file():
        return
    for shard in json.loads(index.read_text())["shards"]:
        reader = reader_from_json(str(folder), split, shard)
        for place in range(reader.samples):
            yield reader[place]


def check_image_tokenizer(folder: Path, tokenizer: ImageTokenizer) -> None:
    """Encode the stored pictures again and compare fingerprint and codes.

    Raises:
        DataError: the shards were made by another image tokenizer.
    """
    made_by = read_manifest(folder)["image_tokenizer"]["fingerprint"]
    if made_by != tokenizer.fingerprint():
        found = f"{tokenizer.folder} ({tokenizer.fingerprint()[:12]})"
        raise DataError(f"{folder} was made by another image tokenizer ({made_by[:12]}) than {found}.")
    stored = load_file(folder / ROUND_TRIP)
    codes = tokenizer.encode(pixels_of(stored["pictures"])).cpu()
    agreement = (codes == stored["codes"]).float().mean().item()
    # Ties between codes may fall otherwise on another device; another tokenizer agrees on almost nothing.
    if agreement < 0.95:
        raise DataError(
            f"{tokenizer.folder} gives the codes of {folder} to only {agreement:.0%} here; wanted is 95%."
        )


def check_shards(folder: Path) -> dict[str, int]:
    """Read every sample of a shard folder; return the number of samples of each split.

    Raises:
        DataError: a count or a range that the manifest does not tell of.
    """
    manifest = read_manifest(folder)
    counts = {}
    for split, wanted in manifest["counts"].items():
        samples = tqdm(read_split(folder, split), total=wanted, unit="sample", desc=split)
        counts[split] = sum(1 for sample in samples if _in_range(sample, folder, manifest))
        if counts[split] != wanted:
            raise DataError(f"{folder / split} has {counts[split]} samples; the manifest says {wanted}.")
    return counts


def _in_range(sample: dict[str, Any], folder: Path, manifest: dict[str, Any]) -> bool:
    num_tokens = manifest["text_tokenizer"]["num_tokens"]
    if (
        sample["codes"].max() >= manifest["codebook_size"]
        or len(sample["codes"]) != manifest["codes_per_image"]
    ):
        raise DataError(f"{folder}: sample {sample['key']} has codes that its tokenizer cannot make.")
    if len(sample["caption_ids"]) and sample["caption_ids"].max() >= num_tokens:
        raise DataError(f"{folder}: sample {sample['key']} has caption ids from {num_tokens} on.")
    return True


def _begin(part: Path, arguments: dict[str, Any]) -> None:
    file = part / "arguments.json"
    if file.exists():
        _same_arguments(part, json.loads(file.read_text()), arguments)
        return
    (part / "units").mkdir(parents=True, exist_ok=True)
    _write_json(file, arguments)


def _same_arguments(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [
        f"{key}: {found.get(key)} there, {wanted[key]} asked"
        for key in wanted
        if found.get(key) != wanted[key]
    ]
    if changed:
        raise UserError(
            f"{folder} was made with other arguments ({'; '.join(changed)}). Choose another --out."
        )


def _unit_file(part: Path, index: int) -> Path:
    return part / "units" / f"{index:06d}.json"


def _write_unit(
    part: Path,
    index: int,
    pairs: list[Pair] | Any,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    config: PrepareConfig,
) -> None:
    """Encode one unit and write its shard of each split; the unit's own file, written last, says it is whole."""
    broken: list[dict[str, str]] = []
    kept: list[tuple[Pair, Image.Image]] = []
    for pair in pairs:
        try:
            kept += views(pair, config)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            broken.append({"key": pair.key, "reason": f"{type(error).__name__}: {error}"})
    codes = _encode([image for _, image in kept], image_tokenizer, config.batch_size)
    columns = {
        "key": "str",
        "caption": "str",
        "caption_ids": f"ndarray:{_smallest(text_tokenizer.num_tokens)}",
        "codes": f"ndarray:{_smallest(image_tokenizer.codebook_size)}",
    }
    counts = Counter(pair.split for pair, _ in kept)
    for split in counts:
        folder = part / split / f"unit_{index:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        with MDSWriter(out=str(folder), columns=columns, size_limit=None) as writer:
            for (pair, _), row in zip(kept, codes, strict=True):
                if pair.split == split:
                    ids = text_tokenizer.encode(pair.caption).numpy()
                    writer.write(
                        {
                            "key": pair.key,
                            "caption": pair.caption,
                            "caption_ids": ids.astype(_smallest(text_tokenizer.num_tokens)),
                            "codes": row.astype(_smallest(image_tokenizer.codebook_size)),
                        }
                    )
    _write_json(_unit_file(part, index), {"counts": counts, "broken": broken})


def views(pair: Pair, config: PrepareConfig) -> list[tuple[Pair, Image.Image]]:
    """Crop and resize a pair's picture; a training pair also gets shifted copies, with keys KEY@1, KEY@2, ..."""
    image = centre_crop_resize(pair.open(), size=config.image_size)
    made = [(pair, image)]
    reach = config.image_size // 16
    for number in range(1, config.views if pair.split == "train" else 1):
        right, down = (
            int(hash_uniform("view", pair.key, number, axis) * (2 * reach + 1)) - reach
            for axis in ("right", "down")
        )
        made.append((replace(pair, key=f"{pair.key}@{number}"), shifted(image, right=right, down=down)))
    return made


def _encode(images: list[Image.Image], tokenizer: ImageTokenizer, batch_size: int) -> np.ndarray:
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    codes = [tokenizer.encode(to_pixels(batch)).cpu().numpy() for batch in batches]
    return np.concatenate(codes) if codes else np.empty((0, 0), dtype=np.int64)


def _finish(
    part: Path,
    num_units: int,
    source: Source,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    config: PrepareConfig,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Merge the units' indexes, keep a round trip, count floors, write the manifest."""
    units = [json.loads(_unit_file(part, index).read_text()) for index in range(num_units)]
    counts: Counter[str] = Counter()
    for unit in units:
        counts.update(unit["counts"])
    if not counts["train"]:
        raise DataError(f"no picture of {source.name} could be read for training; see {part / 'units'}.")
    for split in counts:
        merge_index(str(part / split), keep_local=True)
    broken = [entry for unit in units for entry in unit["broken"]]
    (part / BROKEN).write_text("".join(json.dumps(entry) + "\n" for entry in broken))
    _write_round_trip(part, source, image_tokenizer, config)
    codes = {split: np.stack([sample["codes"] for sample in read_split(part, split)]) for split in counts}
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "licence": source.licence,
        "split_rule": source.split_rule,
        "heldout_share": source.heldout_share,
        "counts": {split: counts[split] for split in SPLITS if counts[split]},
        "broken": len(broken),
        "left_out": dict(source.left_out),
        "image_size": config.image_size,
        "codes_per_image": image_tokenizer.num_codes(config.image_size),
        "codebook_size": image_tokenizer.codebook_size,
        "image_tokenizer": {
            "name": str(image_tokenizer.folder),
            "fingerprint": image_tokenizer.fingerprint(),
        },
        "text_tokenizer": {
            "name": text_tokenizer.name,
            "fingerprint": text_tokenizer.fingerprint(),
            "num_tokens": text_tokenizer.num_tokens,
        },
        "floors_nats": code_floors(codes, codebook_size=image_tokenizer.codebook_size),
        "arguments": arguments,
        "prepare": asdict(config),
    }
    _write_json(part / MANIFEST, manifest)
    return manifest


def _write_round_trip(part: Path, source: Source, tokenizer: ImageTokenizer, config: PrepareConfig) -> None:
    """Store the first eight readable pictures of each eighth of the source, their codes and reconstructions."""
    wanted = max(1, len(source.pairs) // NUM_ROUND_TRIP)
    images: list[Image.Image] = []
    for pair in [*source.pairs[::wanted], *source.pairs]:
        try:
            images.append(centre_crop_resize(pair.open(), size=config.image_size))
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # already listed in broken.jsonl
        if len(images) == NUM_ROUND_TRIP:
            break
    pixels = to_pixels(images)
    codes = tokenizer.encode(pixels).cpu()
    decoded = pictures_of(tokenizer.decode(codes)).cpu()
    pictures = pictures_of(pixels)
    save_file(
        {"pictures": pictures.contiguous(), "codes": codes, "decoded": decoded.contiguous()},
        part / ROUND_TRIP,
    )
    rows = torch.stack([pictures, decoded])  # (2, N, H, W, 3)
    grid = rows.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)
    Image.fromarray(grid.numpy()).save(part / RECONSTRUCTIONS)


def _smallest(num_values: int) -> str:
    return "uint16" if num_values <= 2**16 else "uint32"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)
