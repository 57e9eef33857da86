"""Merge complete units into one dataset, in the order of the units: drop repeated keys, write one index per split."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from streaming.base.format import reader_from_json

from t2i.data.prepare.encode import (
    REPEATED,
    Encoder,
    facts_file,
    key_hash,
    read_keys,
    unit_name,
    write_rows,
)
from t2i.data.shards.integrity import Sample
from t2i.data.sources import Tally
from t2i.files import read_json, write_whole


@dataclass(frozen=True)
class Merged:
    """The totals of all units."""

    counts: Counter[str] = field(default_factory=Counter)
    """Samples of each split, views included."""
    caption_tokens: Counter[int] = field(default_factory=Counter)
    """Kept pairs by the number of their caption's ids."""
    tally: Tally = field(default_factory=Tally)
    broken: list[dict[str, str]] = field(default_factory=list)


def merge_units(part: Path, num_units: int, *, encoder: Encoder) -> Merged:
    """Write each split's index over its units; of a key in several units, keep the first."""
    merged = Merged()
    # Found here and not before encoding, which would have to read every header of every tar.
    repeated = repeated_keys([read_keys(part, index) for index in range(num_units)])
    names: dict[str, list[str]] = {}
    for index in range(num_units):
        facts = json.loads(facts_file(part, index).read_text())
        merged.tally.add(
            Tally(
                facts["seen"],
                Counter(facts["left_out"]),
                Counter(facts["changed"]),
                Counter(facts["unread"]),
            )
        )
        merged.broken.extend(facts["broken"])
        merged.caption_tokens.update(
            {int(length): count for length, count in facts["caption_tokens"].items()}
        )
        for key in repeated.get(index, ()):
            merged.tally.changed.subtract(facts["changed_keys"].get(str(key), ()))
        for split, count in facts["counts"].items():
            name = unit_name(index)
            if index in repeated:
                name, lengths, count = _without(part, split, name, repeated[index], encoder)
                merged.tally.left_out[REPEATED] += lengths.total()
                merged.caption_tokens.subtract(lengths)
            if count:
                names.setdefault(split, []).append(name)
                merged.counts[split] += count
    for split in names:
        _write_index(part / split, names[split])
    return merged


def _write_index(folder: Path, units: list[str]) -> None:
    """Write one index over the shards of a split's units, as Streaming's merge_index does."""
    # Not by merge_index itself, which writes by way of /tmp: another disk, which may be full.
    shards = []
    for unit in units:
        for shard in read_json(folder / unit / "index.json")["shards"]:
            shard["raw_data"]["basename"] = f"{unit}/{shard['raw_data']['basename']}"
            shards.append(shard)
    write_whole(folder / "index.json", json.dumps({"version": 2, "shards": shards}))


def repeated_keys(hashes: list[np.ndarray]) -> dict[int, set[int]]:
    """Find the keys that an earlier unit has too: per unit, their hashes."""
    together = np.concatenate([np.zeros(0, np.uint64), *hashes])
    units = np.repeat(np.arange(len(hashes)), np.array([len(one) for one in hashes], dtype=int))
    # Stable, so that of equal hashes the one of the earliest unit comes first, and is kept.
    order = np.argsort(together, kind="stable")
    later = order[1:][together[order[1:]] == together[order[:-1]]]
    found: dict[int, set[int]] = {}
    for place in later:
        found.setdefault(int(units[place]), set()).add(int(together[place]))
    return found


def read_unit(part: Path, split: str, name: str) -> Iterator[Sample]:
    """Read the samples of one unit's shard."""
    for shard in json.loads((part / split / name / "index.json").read_text())["shards"]:
        reader = reader_from_json(str(part / split), name, shard)
        for place in range(reader.samples):
            yield reader[place]


def _without(
    part: Path, split: str, name: str, repeated: set[int], encoder: Encoder
) -> tuple[str, Counter[int], int]:
    """Write a unit's shard again without repeated keys.

    Returns:
        the new name, the images left out by the number of their caption's ids, and the number of rows kept.
    """
    kept: list[Sample] = []
    left_out: Counter[int] = Counter()
    is_kept = True
    views = encoder.config.views if split == "train" else 1
    for place, row in enumerate(read_unit(part, split, name)):
        # Views follow their image and leave with it: their own keys (KEY@1, ...) are not in the hashes.
        if place % views == 0:
            is_kept = key_hash(row["key"]) not in repeated
            if not is_kept:
                # MDS has no empty arrays: an empty caption has one id there.
                left_out[len(row["caption_ids"]) if row["caption"] else 0] += 1
        if is_kept:
            kept.append(row)
    # Another name: a killed merge starts again from the unit, which must still be whole.
    name = f"{name}_once"
    if kept:
        write_rows(part, split, name, rows=kept, encoder=encoder)
    return name, left_out, len(kept)
