"""MDS shards and their manifest: read and check.

A shard folder holds train/, heldout/ and combinations/ (MosaicML Streaming's MDS), manifest.json, broken.jsonl
(pictures that could not be read, with the reason), both tokenizers (image_tokenizer/, text_tokenizer/) and
roundtrip.safetensors with reconstructions.png (eight pictures, their codes and what the tokenizer makes of them).
"""

import json
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash
from streaming.base.format import reader_from_json
from tqdm import tqdm

from t2i.data.remote import fetch
from t2i.errors import DataError
from t2i.tokens.image import ROUND_TRIP, ImageTokenizer, check_round_trip

FORMAT_VERSION = 2
MANIFEST, BROKEN, RECONSTRUCTIONS = "manifest.json", "broken.jsonl", "reconstructions.png"
IMAGE_TOKENIZER, TEXT_TOKENIZER = "image_tokenizer", "text_tokenizer"
"""Folders of the tokenizers that made the shards."""


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
            " Prepare the source again."
        )
    return manifest


def fetch_shards(folder: Path, *, remote: str) -> None:
    """Bring the manifest and the files beside the shards from `remote`; shards follow as they are read.

    Raises:
        DataError: a file is not there or arrives broken, or `folder` holds other shards.
    """
    new = fetch(remote, folder, MANIFEST, anew=True)
    if (folder / MANIFEST).exists() and new.read_bytes() != (folder / MANIFEST).read_bytes():
        new.unlink()
        raise DataError(
            f"data.shards {folder} caches other shards than {remote} holds now; choose another folder."
        )
    for name, wanted in json.loads(new.read_text())["files"].items():
        found = file_hash(fetch(remote, folder, name))
        if found != wanted:
            (folder / name).unlink()
            raise DataError(f"{remote}/{name} arrived with the hash {found}; the manifest says {wanted}.")
    new.replace(folder / MANIFEST)


def read_split(
    folder: Path, split: str, *, num_samples: int | None = None, remote: str = ""
) -> Iterator[dict[str, Any]]:
    """Read samples of one split in their order: key, caption, caption_ids, codes.

    Args:
        num_samples: read so many, evenly spread; None for all.
        remote: where shards come from that `folder` does not have yet.
    """
    if remote and split in read_manifest(folder)["counts"]:
        fetch(remote, folder, f"{split}/index.json")
    index = folder / split / "index.json"
    if not index.is_file():
        return
    readers = [
        reader_from_json(str(folder), split, shard) for shard in json.loads(index.read_text())["shards"]
    ]
    ends = list(accumulate(reader.samples for reader in readers))
    step = 1 if num_samples is None else max(1, ends[-1] // num_samples)
    at = 0
    for place in range(0, ends[-1], step)[:num_samples]:
        while place >= ends[at]:
            at += 1
        if remote:
            fetch(remote, folder, f"{split}/{readers[at].raw_data.basename}")
        yield readers[at][place - ends[at]]


def has_image_tokenizer(manifest: dict[str, Any]) -> bool:
    """Tell shards of pictures from those of given ids and of documents, which no image tokenizer decodes."""
    return manifest.get("given_ids") is False


def check_image_tokenizer(folder: Path, tokenizer: ImageTokenizer) -> None:
    """Encode the stored pictures again and compare fingerprint and codes.

    Raises:
        DataError: the shards were made by another image tokenizer.
    """
    made_by = read_manifest(folder)["image_tokenizer"]["fingerprint"]
    if made_by != tokenizer.fingerprint():
        found = f"{tokenizer.folder} ({tokenizer.fingerprint()[:12]})"
        raise DataError(f"{folder} was made by another image tokenizer ({made_by[:12]}) than {found}.")
    check_round_trip(tokenizer, folder / ROUND_TRIP)


def check_shards(folder: Path) -> dict[str, int]:
    """Hash every file and read every sample of a shard folder; return the number of samples of each split.

    Raises:
        DataError: a hash, a count or a range that the manifest or an index does not tell of.
    """
    manifest = read_manifest(folder)
    for name, wanted in {**manifest["files"], **_shard_hashes(folder, manifest)}.items():
        if not (folder / name).is_file() or file_hash(folder / name) != wanted:
            raise DataError(f"{folder / name} is missing or has changed since it was made; prepare again.")
    counts = {}
    for split, wanted in manifest["counts"].items():
        samples = tqdm(read_split(folder, split), total=wanted, unit="sample", desc=split)
        counts[split] = sum(1 for sample in samples if _in_range(sample, folder, manifest))
        if counts[split] != wanted:
            raise DataError(f"{folder / split} has {counts[split]} samples; the manifest says {wanted}.")
    return counts


def file_hash(path: Path) -> str:
    """Hash a file's bytes (xxh64, hex)."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def side_files(folder: Path) -> dict[str, str]:
    """Hash the files beside the shards that training reads: the round trip and the tokenizers."""
    found = [folder / ROUND_TRIP, *folder.glob(f"{IMAGE_TOKENIZER}/*"), *folder.glob(f"{TEXT_TOKENIZER}/*")]
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(found) if path.is_file()}


def _shard_hashes(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Read the indexes' hashes, by file."""
    shards = [
        (split, shard["raw_data"])
        for split in manifest["counts"]
        for shard in json.loads((folder / split / "index.json").read_text())["shards"]
    ]
    return {f"{split}/{data['basename']}": data["hashes"]["xxh64"] for split, data in shards}


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
