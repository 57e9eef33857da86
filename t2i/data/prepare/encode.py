"""One unit of a preparation: its pairs to codes, written aside and moved into place whole.

What is in OUT.part/: SPLIT/unit_000003/ (one shard file), units/000003.keys.npy (hashes of its keys) and, written
last, units/000003.json, which says that the unit is whole.
"""

import os
import shutil
import signal
import socket
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from t2i.config import PrepareConfig
from t2i.data.shards.integrity import Sample
from t2i.data.sources import UNREADABLE, LeftOut, Pair, Unit
from t2i.errors import DataError
from t2i.files import HASH, hash_uniform, write_json
from t2i.tokens.image import ImageTokenizer, centre_crop_resize, shifted, to_pixels
from t2i.tokens.text import TextTokenizer

REPEATED = "a key that was there before"

TASK_PAIRS = 16
"""Pairs that a process takes at a time."""


@dataclass(frozen=True)
class Encoder:
    """What turns pairs into rows, the same on every rank."""

    image_tokenizer: ImageTokenizer | None
    """None where the source gives codes."""
    codebook_size: int
    text_tokenizer: TextTokenizer
    config: PrepareConfig
    pool: Executor | None
    """Processes that read pictures; None to read them here."""
    shows_progress: bool


@dataclass(frozen=True)
class Row:
    """One picture or view with its codes."""

    key: str
    split: str
    caption: str
    is_view: bool
    """A shifted copy; it stands behind its picture."""
    codes: np.ndarray


def unit_name(index: int) -> str:
    """Name a unit's folder in each split."""
    return f"unit_{index:06d}"


def facts_file(part: Path, index: int) -> Path:
    """Name the file that says a unit is whole."""
    return part / "units" / f"{index:06d}.json"


def keys_file(part: Path, index: int) -> Path:
    """Name the file of the hashes of a unit's keys."""
    return part / "units" / f"{index:06d}.keys.npy"


def write_unit(part: Path, index: int, *, unit: Unit, encoder: Encoder) -> None:
    """Encode one unit and write its shard of each split; a half-written one is replaced."""
    left_out: Counter[str] = Counter()
    broken: list[dict[str, str]] = []
    pairs = _first_of_each_key(unit(left_out), left_out)
    rows = list(_encode(pairs, encoder, broken=broken, left_out=left_out))
    counts = Counter(row.split for row in rows)
    for split in counts:
        wanted = (row for row in rows if row.split == split)
        write_rows(part, split, unit_name(index), rows=columns_of(wanted, encoder), encoder=encoder)
    hashes = [key_hash(row.key) for row in rows if not row.is_view]
    np.save(keys_file(part, index), np.array(hashes, dtype=np.uint64))
    write_json(facts_file(part, index), {"counts": counts, "broken": broken, "left_out": left_out})


def columns_of(rows: Iterable[Row], encoder: Encoder) -> Iterator[Sample]:
    """Spell rows as the columns of a shard."""
    id_type = smallest_type(encoder.text_tokenizer.num_tokens)
    for row in rows:
        ids = encoder.text_tokenizer.encode(row.caption).numpy().astype(id_type)
        if not row.caption:
            ids = np.zeros(1, id_type)  # MDS has no empty arrays; caption_ids_of knows
        yield {"key": row.key, "caption": row.caption, "caption_ids": ids, "codes": row.codes}


def column_kinds(encoder: Encoder) -> dict[str, str]:
    """Name MDS's types of the columns."""
    return {
        "key": "str",
        "caption": "str",
        "caption_ids": f"ndarray:{smallest_type(encoder.text_tokenizer.num_tokens)}",
        "codes": f"ndarray:{smallest_type(encoder.codebook_size)}",
    }


def smallest_type(num_values: int) -> str:
    """Choose the smallest unsigned type, of 16 bits at least, that holds so many values."""
    return "uint16" if num_values <= 2**16 else "uint32"


def write_rows(part: Path, split: str, name: str, *, rows: Iterable[Sample], encoder: Encoder) -> None:
    """Write one shard folder, aside under a name of this process, then move it into place."""
    aside = part / "writing" / f"{socket.gethostname()}-{os.getpid()}" / split / name
    shutil.rmtree(aside, ignore_errors=True)
    with MDSWriter(out=str(aside), columns=column_kinds(encoder), size_limit=None, hashes=[HASH]) as writer:
        for row in rows:
            writer.write(row)
    final = part / split / name
    shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(exist_ok=True)
    aside.rename(final)


def key_hash(key: str) -> int:
    """Hash a key to 64 bits."""
    return xxhash.xxh64_intdigest(key.encode())


def _first_of_each_key(pairs: Iterable[Pair], left_out: Counter[str]) -> Iterator[Pair]:
    seen: set[str] = set()
    for pair in pairs:
        if pair.key in seen:
            left_out[REPEATED] += 1
            continue
        seen.add(pair.key)
        yield pair


def _encode(
    pairs: Iterable[Pair], encoder: Encoder, *, broken: list[dict[str, str]], left_out: Counter[str]
) -> Iterator[Row]:
    """Encode pictures in batches that depend on the unit alone; list what is broken, count what filters refuse."""
    code_type = smallest_type(encoder.codebook_size)
    if encoder.image_tokenizer is None:
        yield from (_given_row(pair, code_type) for pair in pairs)
        return
    pictures = _pictures(pairs, encoder, broken=broken, left_out=left_out)
    for batch in iter(lambda: list(islice(pictures, encoder.config.batch_size)), []):
        codes = encoder.image_tokenizer.encode(to_pixels([image for _, _, image in batch])).cpu().numpy()
        for (pair, number, _), row in zip(batch, codes.astype(code_type), strict=True):
            key = view_key(pair.key, number)
            yield Row(key, pair.split, pair.caption, is_view=number > 0, codes=row)


def _given_row(pair: Pair, code_type: str) -> Row:
    assert pair.codes is not None, "a source of ids has nothing else"
    return Row(pair.key, pair.split, pair.caption, is_view=False, codes=pair.codes.astype(code_type))


def _pictures(
    pairs: Iterable[Pair], encoder: Encoder, *, broken: list[dict[str, str]], left_out: Counter[str]
) -> Iterator[tuple[Pair, int, Image.Image]]:
    """Read pictures and their views, with the number of the view."""
    done = decode_all(pairs, config=encoder.config, pool=encoder.pool)
    for pair, decoded in tqdm(done, unit="pair", leave=False, disable=not encoder.shows_progress):
        if decoded.left_out:
            left_out[decoded.left_out] += 1
        if decoded.broken:
            broken.append({"key": pair.key, "reason": decoded.broken})
        yield from ((pair, number, image) for number, image in enumerate(decoded.pictures))


@dataclass(frozen=True)
class Decoded:
    """What became of one pair's picture."""

    pictures: list[Image.Image]
    """As it is, and its shifted views; none if it was not usable."""
    left_out: str = ""
    """The filter that refused it."""
    broken: str = ""
    """The error that reading it raised."""


@contextmanager
def decoding(config: PrepareConfig) -> Iterator[Executor | None]:
    """Start config.workers processes; None for none of them.

    They are forked, as a DataLoader's are, and touch neither torch nor a GPU.
    """
    if not config.workers:
        yield None
        return
    context = get_context("fork")
    with ProcessPoolExecutor(config.workers, mp_context=context, initializer=_leave_signals) as pool:
        yield pool


def decode_all(
    pairs: Iterable[Pair], *, config: PrepareConfig, pool: Executor | None
) -> Iterator[tuple[Pair, Decoded]]:
    """Read pictures in the order of their pairs, a few tasks ahead of who asks.

    Raises:
        DataError: a process died, mostly for want of memory.
    """
    if pool is None:
        yield from ((pair, decode(pair, config=config)) for pair in pairs)
        return
    rest = iter(pairs)
    tasks = iter(lambda: list(islice(rest, TASK_PAIRS)), [])
    ahead = deque(
        (task, pool.submit(_decode_task, task, config)) for task in islice(tasks, 4 * config.workers)
    )
    try:
        while ahead:
            task, future = ahead.popleft()
            done = future.result()
            ahead.extend((task, pool.submit(_decode_task, task, config)) for task in islice(tasks, 1))
            yield from zip(task, done, strict=True)
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {config.workers} processes that read pictures died, mostly for want of memory."
            " Fewer --workers need less; the same command goes on."
        ) from error


def decode(pair: Pair, *, config: PrepareConfig) -> Decoded:
    """Read one pair's picture and make its views, or say why not."""
    try:
        return Decoded(views(pair, config))
    except LeftOut as reason:
        return Decoded([], left_out=str(reason))
    except UNREADABLE as error:
        return Decoded([], broken=f"{type(error).__name__}: {error}")


def views(pair: Pair, config: PrepareConfig) -> list[Image.Image]:
    """Crop and resize a pair's picture; a training pair also gets config.views - 1 shifted copies."""
    image = centre_crop_resize(pair.open(), size=config.image_size)
    made = [image]
    reach = config.image_size // 16
    for number in range(1, num_views(pair, config)):
        right, down = (
            int(hash_uniform("view", pair.key, number, axis) * (2 * reach + 1)) - reach
            for axis in ("right", "down")
        )
        made.append(shifted(image, right=right, down=down))
    return made


def num_views(pair: Pair, config: PrepareConfig) -> int:
    """Count the pictures made of one pair."""
    return config.views if pair.split == "train" else 1


def view_key(key: str, number: int) -> str:
    """Name a view: KEY, KEY@1, KEY@2, ..."""
    return f"{key}@{number}" if number else key


def _decode_task(task: list[Pair], config: PrepareConfig) -> list[Decoded]:
    return [decode(pair, config=config) for pair in task]


def _leave_signals() -> None:
    """Ctrl-C is for the process that asked; it ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
