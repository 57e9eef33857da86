"""Encode one unit of a preparation: its pairs become one shard file per split, each written aside and then renamed.

Files of a unit in OUT.part/: SPLIT/unit_000003/ (one shard file), units/000003.keys (hashes of its keys) and
units/000003.json. The last is written last, so that its presence means that the unit is complete.
"""

import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from t2i.config import PrepareConfig
from t2i.data.prepare.decode import decode_all
from t2i.data.shards.integrity import Sample
from t2i.data.sources import Pair, Tally, Unit
from t2i.files import HASH, write_bytes_whole, write_json
from t2i.tokens.image import ImageTokenizer, to_pixels
from t2i.tokens.text import TextTokenizer

REPEATED = "a key that was there before"
NO_TOKEN = "a caption without a token"


@dataclass(frozen=True)
class Encoder:
    """What encodes pairs, the same on every rank."""

    image_tokenizer: ImageTokenizer | None
    """None if the source has precomputed codes."""
    codebook_size: int
    text_tokenizer: TextTokenizer
    config: PrepareConfig
    pool: Executor | None
    """Processes that decode images; None to decode them in this process."""
    progress: "tqdm[NoReturn]"
    """Counts pairs."""


@dataclass(frozen=True)
class EncodedImage:
    """One image, or one shifted view of it, with its codes."""

    key: str
    split: str
    caption: str
    caption_ids: np.ndarray
    """(T,) ids of the text tokenizer."""
    is_view: bool
    """A shifted copy, which follows its image."""
    changed: tuple[str, ...]
    """What was lost or guessed when the caption and the image were read."""
    codes: np.ndarray
    """(K,)"""
    style: str = ""


def unit_name(index: int) -> str:
    """Name a unit's folder in each split."""
    return f"unit_{index:06d}"


def facts_file(part: Path, index: int) -> Path:
    """Name the file whose presence means that a unit is complete."""
    return part / "units" / f"{index:06d}.json"


def keys_file(part: Path, index: int) -> Path:
    """Name the file that holds the hashes of a unit's keys."""
    return part / "units" / f"{index:06d}.keys"


def write_unit(part: Path, index: int, *, unit: Unit, encoder: Encoder) -> None:
    """Encode one unit and write its shard of each split, replacing a half-written one."""
    tally = Tally()
    broken: list[dict[str, str]] = []
    pairs = _first_of_each_key(unit(tally), tally)
    rows = list(_with_tokens(_encode(pairs, encoder, broken=broken, tally=tally), tally))
    counts = Counter(row.split for row in rows)
    for split in counts:
        wanted = (row for row in rows if row.split == split)
        write_rows(part, split, unit_name(index), rows=columns_of(wanted, encoder), encoder=encoder)
    hashes = np.array([key_hash(row.key) for row in rows if not row.is_view], dtype=np.uint64)
    write_bytes_whole(keys_file(part, index), hashes.tobytes())
    tokens = Counter(len(row.caption_ids) for row in rows if not row.is_view)
    # By key, because the merge leaves out keys of earlier units.
    changed = {str(key_hash(row.key)): row.changed for row in rows if row.changed and not row.is_view}
    tally.changed.update(reason for reasons in changed.values() for reason in reasons)
    facts = {
        "counts": counts,
        "caption_tokens": tokens,
        "broken": broken,
        "changed_keys": changed,
        **vars(tally),
    }
    # Last: a unit without this file is encoded again, whatever a killed process has left of it.
    write_json(facts_file(part, index), facts)


def read_keys(part: Path, index: int) -> NDArray[np.uint64]:
    """Read the hashes of a unit's keys, one per image that was kept."""
    return np.fromfile(keys_file(part, index), dtype=np.uint64)


def columns_of(rows: Iterable[EncodedImage], encoder: Encoder) -> Iterator[Sample]:
    """Turn rows into the columns of a shard."""
    id_type = smallest_type(encoder.text_tokenizer.num_tokens)
    for row in rows:
        ids = row.caption_ids.astype(id_type)
        if not row.caption:
            # MDS has no empty arrays. caption_ids_of drops this id again.
            ids = np.zeros(1, id_type)
        sample = Sample(key=row.key, caption=row.caption, caption_ids=ids, codes=row.codes)
        if row.style:
            sample["style"] = row.style
        yield sample


def column_kinds(encoder: Encoder) -> dict[str, str]:
    """Name the MDS types of the columns."""
    return {
        "key": "str",
        "caption": "str",
        "caption_ids": f"ndarray:{smallest_type(encoder.text_tokenizer.num_tokens)}",
        "codes": f"ndarray:{smallest_type(encoder.codebook_size)}",
    }


def smallest_type(num_values: int) -> str:
    """Choose the smallest unsigned type, of 16 bits at least, that holds num_values values."""
    return "uint16" if num_values <= 2**16 else "uint32"


def write_rows(part: Path, split: str, name: str, *, rows: Iterable[Sample], encoder: Encoder) -> None:
    """Write one shard folder whole or not at all."""
    # Aside and then renamed, so that no reader meets half a shard. The name holds host and process, because
    # ranks of several machines share this folder.
    aside = part / "writing" / f"{socket.gethostname()}-{os.getpid()}" / split / name
    shutil.rmtree(aside, ignore_errors=True)
    rows = list(rows)
    columns = column_kinds(encoder) | ({"style": "str"} if rows and "style" in rows[0] else {})
    # No size limit: a unit is one shard file, and its content must not depend on who encoded it.
    with MDSWriter(out=str(aside), columns=columns, size_limit=None, hashes=[HASH]) as writer:
        for row in rows:
            writer.write(row)
    final = part / split / name
    shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(exist_ok=True)
    aside.rename(final)


def key_hash(key: str) -> int:
    """Hash a key (64 bits)."""
    return xxhash.xxh64_intdigest(key.encode())


def _first_of_each_key(pairs: Iterable[Pair], tally: Tally) -> Iterator[Pair]:
    seen: set[str] = set()
    for pair in pairs:
        if pair.key in seen:
            tally.left_out[REPEATED] += 1
            continue
        seen.add(pair.key)
        yield pair


def _encode(
    pairs: Iterable[Pair], encoder: Encoder, *, broken: list[dict[str, str]], tally: Tally
) -> Iterator[EncodedImage]:
    """Encode a unit's images; list the broken ones and count those that filters refuse."""
    code_type = smallest_type(encoder.codebook_size)
    if encoder.image_tokenizer is None:
        for pair in pairs:
            encoder.progress.update()
            assert pair.codes is not None, "a source of ids has nothing else"
            yield _row(pair, pair.codes.astype(code_type), encoder.text_tokenizer, changed=pair.changed)
        return
    images = _images(pairs, encoder, broken=broken, tally=tally)
    # Batches start anew with each unit. In lower precision codes may depend on the batch, and shards must
    # be the same whichever rank encodes the unit.
    for batch in iter(lambda: list(islice(images, encoder.config.batch_size)), []):
        codes = encoder.image_tokenizer.encode(to_pixels([image for _, _, image, _ in batch])).cpu().numpy()
        for (pair, number, _, changed), row in zip(batch, codes.astype(code_type), strict=True):
            yield _row(pair, row, encoder.text_tokenizer, number=number, changed=changed)


def _with_tokens(rows: Iterable[EncodedImage], tally: Tally) -> Iterator[EncodedImage]:
    """Leave out captions of which the text tokenizer leaves nothing, such as a zero-width space alone."""
    for row in rows:
        # An empty caption is meant, and is kept.
        if len(row.caption_ids) or not row.caption:
            yield row
        elif not row.is_view:
            tally.left_out[NO_TOKEN] += 1


def _row(
    pair: Pair, codes: np.ndarray, tokenizer: TextTokenizer, *, changed: tuple[str, ...], number: int = 0
) -> EncodedImage:
    ids = tokenizer.encode(pair.caption).numpy()
    key = view_key(pair.key, number)
    return EncodedImage(
        key,
        pair.split,
        pair.caption,
        ids,
        is_view=number > 0,
        changed=changed,
        codes=codes,
        style=pair.style,
    )


def _images(
    pairs: Iterable[Pair], encoder: Encoder, *, broken: list[dict[str, str]], tally: Tally
) -> Iterator[tuple[Pair, int, Image.Image, tuple[str, ...]]]:
    """Decode images and their views, with the number of the view and what was changed."""
    for pair, decoded in decode_all(pairs, config=encoder.config, pool=encoder.pool):
        encoder.progress.update()
        if decoded.left_out:
            tally.left_out[decoded.left_out] += 1
        if decoded.broken:
            broken.append({"key": pair.key, "reason": decoded.broken})
        changed = (*pair.changed, *decoded.changed)
        yield from ((pair, number, image, changed) for number, image in enumerate(decoded.images))


def view_key(key: str, number: int) -> str:
    """Name a view: KEY, KEY@1, KEY@2, ..."""
    return f"{key}@{number}" if number else key
