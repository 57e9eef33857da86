"""Read and check the shards of a folder.

A shard folder holds train/, heldout/ and other held-out splits (MosaicML Streaming's MDS), manifest.json, broken.jsonl
(images that could not be decoded, with the reason), both tokenizers (image_tokenizer/, text_tokenizer/) and
roundtrip.safetensors with reconstructions.png (eight images with their codes and reconstructions).
"""

from collections.abc import Iterator, Sequence, Sized
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from t2i.data.shards.accounts import broken_reasons, check_accounts
from t2i.data.shards.integrity import (
    Sample,
    check_file,
    check_listing,
    read_index,
    read_sample,
    remake_advice,
)
from t2i.data.shards.manifest import BROKEN, MANIFEST, Manifest, read_manifest, read_manifest_file
from t2i.data.shards.remote import fetch
from t2i.errors import DataError
from t2i.tokens.image import ROUND_TRIP, ImageTokenizer, check_round_trip

T = TypeVar("T")


def fetch_shards(folder: Path, *, remote: str) -> None:
    """Download the manifest, the indexes and the files beside the shards; shards follow as they are read.

    Raises:
        DataError: a file is missing or arrives broken, or `folder` caches other shards.
    """
    new = fetch(remote, folder, MANIFEST, anew=True)
    if (folder / MANIFEST).exists() and new.read_bytes() != (folder / MANIFEST).read_bytes():
        new.unlink()
        raise DataError(
            f"data.shards {folder} caches other shards than those of {remote}; choose another folder."
        )
    manifest = read_manifest_file(new)
    for name, wanted in manifest.files.items():
        fetch(remote, folder, name, xxh64=wanted)
    for split in manifest.counts:
        fetch(remote, folder, f"{split}/index.json")
    # The manifest last: a folder without one is not read, so that a download that was killed starts again.
    new.replace(folder / MANIFEST)


def read_split(
    folder: Path, split: str, *, num_samples: int | None = None, subsample_every: int = 1, remote: str = ""
) -> Iterator[Sample]:
    """Read samples of one split in order: key, caption, caption_ids, codes.

    Args:
        num_samples: the number to read, evenly spread; None for all.
        subsample_every: read only every n-th, as training with data.subsample_every does.
        remote: where to download shards from that `folder` does not have yet.

    Raises:
        DataError: a shard is missing or not as it was made; no sample of it is read.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    is_wanted = manifest is not None and split in manifest.counts
    if remote and is_wanted:
        fetch(remote, folder, f"{split}/index.json")
    if not is_wanted and not (folder / split / "index.json").is_file():
        return
    advice = remake_advice(folder, manifest) if manifest else ""
    shards = read_index(folder, split)
    ends = list(accumulate(len(shard.reader) for shard in shards))
    if not ends:
        return
    kept = range(0, ends[-1], subsample_every)
    count = len(kept) if num_samples is None else min(num_samples, len(kept))
    at, hashed = 0, -1
    for place in spread(kept, count):
        while place >= ends[at]:
            at += 1
        shard = shards[at]
        # At the first touch, not once before the run: a disk may fail in between. The bytes are then in
        # memory for the reading that follows.
        if hashed != at:
            if remote:
                fetch(remote, folder, shard.name, xxh64=shard.xxh64)
            else:
                check_file(folder, shard.name, wanted=shard.xxh64, advice=advice)
            hashed = at
        yield read_sample(shard, place - ends[at])


def spread(items: Sequence[T], count: int) -> list[T]:
    """Choose so many items, evenly spread from the first to nearly the last; all of them if there are no more."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def check_image_tokenizer(folder: Path, tokenizer: ImageTokenizer) -> None:
    """Check that an image tokenizer is the one that made the shards, by its weights and by the codes of stored images.

    Raises:
        DataError: another image tokenizer made the shards.
    """
    made_by = read_manifest(folder).code_maker.fingerprint
    if made_by != tokenizer.fingerprint():
        found = f"{tokenizer.folder} ({tokenizer.fingerprint()[:12]})"
        raise DataError(f"{folder} was made by another image tokenizer ({made_by[:12]}) than {found}.")
    check_round_trip(tokenizer, folder / ROUND_TRIP)


def check_shards(folder: Path) -> dict[str, int]:
    """Hash every file and read every sample of a shard folder; return the number of samples per split.

    Raises:
        DataError: a hash, a count or a sample differs from what the manifest or an index says, or an entry of the
            source is not accounted for.
    """
    manifest = read_manifest(folder)
    check_listing(folder, manifest)
    check_accounts(manifest, where=folder)
    num_broken = broken_reasons(folder).total() if manifest.broken is not None else None
    if num_broken != manifest.broken:
        raise DataError(f"{folder / BROKEN} lists {num_broken} images; expected {manifest.broken}.")
    for split, count in manifest.counts.items():
        for sample in tqdm(read_split(folder, split), total=count, unit="sample", desc=split):
            check_sample(sample, manifest=manifest, where=folder / split)
    return dict(manifest.counts)


def check_sample(sample: Sample, *, manifest: Manifest, where: Path) -> None:
    """Check the number and the range of one sample's codes and ids against the manifest.

    Raises:
        DataError: one of them differs; the message names the sample's key.
    """
    key, num_tokens = sample["key"], manifest.text_tokenizer.num_tokens
    _check_range("caption ids", sample["caption_ids"], num_tokens, where=where, key=key)
    if manifest.sequence_tokens is not None:
        _check_length("ids", sample["caption_ids"], manifest.sequence_tokens, where=where, key=key)
        return
    if "caption" not in sample:
        raise DataError(f"{where}: sample {key} has no caption.")
    _check_length("codes", sample.get("codes", ()), manifest.codes_per_image, where=where, key=key)
    _check_range("codes", sample["codes"], manifest.codebook_size, where=where, key=key)


def _check_range(kind: str, values: NDArray[np.unsignedinteger], end: int, *, where: Path, key: str) -> None:
    if len(values) and values.max() >= end:
        raise DataError(f"{where}: sample {key} has {kind} up to {values.max()}; expected 0 to {end - 1}.")


def _check_length(kind: str, values: Sized, wanted: int, *, where: Path, key: str) -> None:
    if len(values) != wanted:
        raise DataError(f"{where}: sample {key} has {len(values)} {kind}; expected {wanted}.")
