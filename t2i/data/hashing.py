"""Decisions and proofs by hash: the same on every rank, machine and day."""

import hashlib
from pathlib import Path

import xxhash


def hash_uniform(*parts: object) -> float:
    """Map parts (joined by their text) to [0, 1), evenly."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def file_hash(path: Path) -> str:
    """Hash a file's bytes (xxh64, hex)."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
