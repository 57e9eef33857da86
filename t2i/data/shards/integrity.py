"""Check that shards are what was prepared: sizes and indexes at the start, each shard's hash before it is read.

Streaming hashes a shard only when it downloads it, and reads a local one unchecked. Here each job verifies the hash of
a shard before it reads the first sample, and a thread hashes all shards ahead of time.
"""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Required, TypedDict

import numpy as np
from numpy.typing import NDArray
from streaming.base.format import reader_from_json
from streaming.base.format.base.reader import Reader

from t2i.config import PrepareConfig, SourceConfig
from t2i.data.shards.manifest import Manifest
from t2i.errors import DataError
from t2i.files import HASH, Kind, check_keys, file_hash, is_inside, read_json, write_json
from t2i.verbs import command_line

logger = logging.getLogger(__name__)

VERIFIED = "verified.json"
"""Lists the size and modification time of verified files, so that later jobs need not hash ahead of time again."""
SAVE_SECONDS = 60.0
"""Interval between writes of verified.json."""
COLUMNS = {
    "key": ("str",),
    "caption": ("str",),
    "caption_ids": ("ndarray:uint16", "ndarray:uint32"),
    "codes": ("ndarray:uint16", "ndarray:uint32"),
    "style": ("str",),
}
"""The columns and types that are read. Streaming knows more types, and reading its pkl can run code from the file."""
SHARD_KEYS: dict[str, Kind] = {
    "version": int,
    "format": str,
    "samples": int,
    "column_names": list,
    "column_encodings": list,
    "column_sizes": list,
    "raw_data": {"basename": str, "bytes": int, "hashes": dict},
}


class Sample(TypedDict, total=False):
    """One sample of a shard: a captioned image as codes, or one sequence of text."""

    key: Required[str]
    caption: str
    """Absent from text shards."""
    caption_ids: Required["NDArray[np.unsignedinteger]"]
    """(T,) ids by the manifest's tokenizer; in text shards the whole sequence (S,)."""
    codes: "NDArray[np.unsignedinteger]"
    """(K,) image codes; absent from text shards."""
    style: str
    """How the image is drawn, of sources that tell it."""


@dataclass(frozen=True)
class ShardFile:
    """One shard, as its index describes it."""

    name: str
    """Path below the shard folder."""
    num_bytes: int
    xxh64: str
    reader: Reader


def read_index(folder: Path, split: str) -> list[ShardFile]:
    """Read a split's index, without its shards.

    Raises:
        DataError: the index is broken, or has entries that prepare.py does not write.
    """
    path = folder / split / "index.json"
    index = read_json(path)
    check_keys(index, {"shards": list}, where=path)
    return [_shard_file(folder, split, entry, where=path) for entry in index["shards"]]


def _shard_file(folder: Path, split: str, entry: object, *, where: Path) -> ShardFile:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a shard is {entry!r:.80}; expected an object of keys.")
    check_keys(entry, SHARD_KEYS, where=where)
    data, columns = entry["raw_data"], entry["column_names"]
    kinds = dict(zip(columns, entry["column_encodings"], strict=False)) if _are_texts(columns) else {}
    for name, kind in kinds.items():
        if kind not in COLUMNS.get(name, ()):
            raise DataError(f"{where}: column {name} is of type {kind!r:.80}, which is never read.")
    numbers = (entry["samples"], data["bytes"], *filter(None, entry["column_sizes"]))
    is_ours = (
        (entry["version"], entry["format"], entry.get("compression")) == (2, "mds", None)
        and kinds.keys() >= {"key", "caption_ids"}
        and len(kinds) == len(columns) == len(entry["column_encodings"]) == len(entry["column_sizes"])
        and all(isinstance(number, int) and number > 0 for number in numbers)
        and is_inside(data["basename"])
    )
    if not is_ours:
        raise DataError(f"{where} has an entry that prepare.py does not write: {entry!r:.200}.")
    if not isinstance(data["hashes"].get(HASH), str):
        raise DataError(
            f"{where}: {data['basename']} has no {HASH}, so it cannot be verified. Prepare it again."
        )
    # Only checked values reach Streaming's reader, whatever else the file says.
    plain = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [HASH],
        "size_limit": None,
        "zip_data": None,
        "raw_data": {key: data[key] for key in ("basename", "bytes", "hashes")},
        **{key: entry[key] for key in ("samples", "column_names", "column_encodings", "column_sizes")},
    }
    name = f"{split}/{data['basename']}"
    return ShardFile(name, data["bytes"], data["hashes"][HASH], reader_from_json(str(folder), split, plain))


def read_sample(shard: ShardFile, place: int) -> Sample:
    """Read one sample of a verified shard.

    Raises:
        DataError: the sample cannot be read.
    """
    # The hash says that the bytes are the author's, not that they make sense.
    try:
        sample: Sample = shard.reader[place]
    except (IndexError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(f"{shard.name}: sample {place} cannot be read: {error}.") from error
    return sample


def _are_texts(values: list[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def check_file(folder: Path, name: str, *, wanted: str, advice: str) -> None:
    """Check the hash of one file of a shard folder.

    Raises:
        DataError: the file is missing or has changed; the message ends with `advice`.
    """
    try:
        found = file_hash(folder / name)
    except OSError as error:
        raise DataError(f"{folder / name} cannot be read: {error.strerror}. {advice}") from error
    if found != wanted:
        raise DataError(f"{folder / name} has {HASH} {found}; expected {wanted}. {advice}")


def check_listing(folder: Path, manifest: Manifest) -> None:
    """Check the names and sizes of all shards and their indexes, and hash the files beside them; no shard is read.

    Raises:
        DataError: a file is missing, unexpected, or not as it was made.
    """
    advice = remake_advice(folder, manifest)
    for name, wanted in manifest.files.items():
        check_file(folder, name, wanted=wanted, advice=advice)
    for split, count in manifest.counts.items():
        shards = read_index(folder, split)
        found = sum(len(shard.reader) for shard in shards)
        if found != count:
            raise DataError(
                f"{folder / split / 'index.json'} lists {found} samples; expected {count}. {advice}"
            )
        for shard in shards:
            _check_size(folder, shard, advice)
        listed = {folder / shard.name for shard in shards}
        strange = next((path for path in sorted((folder / split).rglob("*.mds")) if path not in listed), None)
        if strange:
            raise DataError(f"{strange} is not in {split}/index.json. {advice}")


def _check_size(folder: Path, shard: ShardFile, advice: str) -> None:
    # Sizes alone: hashing all shards would delay each start, by an hour at the paper's 134 million pairs,
    # and a disk may fail after it. Each shard is hashed before its first sample is read.
    path = folder / shard.name
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. {advice}") from error
    if found != shard.num_bytes:
        raise DataError(f"{path} has {found} bytes; expected {shard.num_bytes}. {advice}")


def remake_advice(folder: Path, manifest: Manifest) -> str:
    """Say how to make a shard folder again, with the command that made it."""
    return f"Move {folder} away and make it again: {remake_command(folder, manifest)}"


def remake_command(folder: Path, manifest: Manifest) -> str:
    """Return the command that prepares a shard folder as it was made."""
    source = manifest.arguments.get("source_path", manifest.source)
    flags: dict[str, object] = {"source": source, "out": folder}
    if manifest.is_text:
        flags |= {"seq-len": manifest.sequence_tokens}
    else:
        flags |= {"image-tokenizer": manifest.code_maker.name}
        flags |= _changed(manifest.prepare, PrepareConfig()) | _changed(manifest.reading, SourceConfig())
        dtype = manifest.arguments.get("dtype", "float32")
        flags |= {} if dtype == "float32" else {"dtype": dtype}
    flags |= {
        "text-tokenizer": manifest.text_tokenizer.name,
        "heldout-share": manifest.heldout_share,
    }
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return command_line("prepare", *words)


def _changed(found: dict[str, object] | None, defaults: PrepareConfig | SourceConfig) -> dict[str, object]:
    """Return a manifest's settings that differ from the defaults."""
    return {key: value for key, value in (found or {}).items() if value != getattr(defaults, key, value)}


class Verified:
    """The verified files of a shard folder, recognised by size and modification time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.known = read_json(folder / VERIFIED)
        except DataError:
            # None yet, or broken. Everything is hashed again, which costs time and nothing else.
            self.known = {}

    def has(self, name: str, *, wanted: str) -> bool:
        """Tell whether a file is unchanged since its hash was verified."""
        return self.known.get(name) == self._stamp(name, wanted)

    def add(self, name: str, *, wanted: str) -> None:
        """Record a verified file."""
        self.known[name] = self._stamp(name, wanted)

    def save(self) -> None:
        """Write verified.json for later jobs, if the folder is writable."""
        try:
            write_json(self.folder / VERIFIED, self.known)
        except OSError as error:
            logger.info(
                "%s is not written (%s): the next job hashes all shards again",
                self.folder / VERIFIED,
                error.strerror,
            )

    def _stamp(self, name: str, wanted: str) -> list[int | str]:
        try:
            found = (self.folder / name).stat()
        except OSError:
            return []
        return [found.st_size, found.st_mtime_ns, wanted]


class LookAhead(threading.Thread):
    """Hashes all shards of a folder while a job trains, so that a bad one is found in the first minutes."""

    def __init__(self, folder: Path, *, manifest: Manifest) -> None:
        # A daemon, so that a run can end before the last shard is hashed.
        super().__init__(daemon=True, name="look ahead")
        self.folder, self.manifest = folder, manifest
        self.failure: DataError | None = None

    def run(self) -> None:
        """Hash the shards that are not verified yet; stop at the first bad one."""
        verified, advice = Verified(self.folder), remake_advice(self.folder, self.manifest)
        saved = time.monotonic()
        try:
            for split in self.manifest.counts:
                for shard in read_index(self.folder, split):
                    if not verified.has(shard.name, wanted=shard.xxh64):
                        check_file(self.folder, shard.name, wanted=shard.xxh64, advice=advice)
                        verified.add(shard.name, wanted=shard.xxh64)
                    if time.monotonic() > saved + SAVE_SECONDS:
                        verified.save()
                        saved = time.monotonic()
        except DataError as error:
            # Kept for `check`: an exception in a thread ends only the thread.
            self.failure = error
        verified.save()

    def check(self) -> None:
        """Raise the error that the thread found, if any.

        Raises:
            DataError: a shard is missing or has changed.
        """
        if self.failure:
            raise self.failure
