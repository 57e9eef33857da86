"""Merge complete units into one dataset, in the order of the units: drop repeated keys, write one index per split."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from streaming.base.format import reader_from_json
from streaming.base.util import merge_index

from t2i.data.prepare.encode import (
    REPEATED,
    Encoder,
    facts_file,
    key_hash,
    keys_file,
    unit_name,
    write_rows,
)
from t2i.data.shards.integrity import Sample
from t2i.data.sources import Tally


@dataclass(frozen=True)
class Merged:
    """The totals of all units."""

    counts: Counter[str]
    tally: Tally
    broken: list[dict[str, str]]
    replaced: list[Path]
    """Unit folders that were written again without repeated keys."""


def merge_units(part: Path, num_units: int, *, encoder: Encoder) -> Merged:
    """Write each split's index over its units; of a key in several units, keep the first."""
    merged = Merged(Counter(), Tally(), [], [])
    # Found here and not before encoding, which would have to read every header of every tar.
    repeated = repeated_keys([np.load(keys_file(part, index)) for index in range(num_units)])
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
        for split, count in facts["counts"].items():
            name = unit_name(index)
            if index in repeated:
                merged.replaced.append(part / split / name)
                name, num_left_out, count = _without(part, split, name, repeated[index], encoder)
                merged.tally.left_out[REPEATED] += num_left_out
            if count:
                names.setdefault(split, []).append(name)
                merged.counts[split] += count
    for split in names:
        # A merge that was killed may have left an index.
        (part / split / "index.json").unlink(missing_ok=True)
        merge_index([str(part / split / name / "index.json") for name in names[split]], str(part / split))
    return merged


def repeated_keys(hashes: list[np.ndarray]) -> dict[int, set[int]]:
    """Find the keys that an earlier unit has too: per unit, their hashes."""
    together = np.concatenate(hashes)
    units = np.repeat(np.arange(len(hashes)), [len(one) for one in hashes])
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


def _without(part: Path, split: str, name: str, repeated: set[int], encoder: Encoder) -> tuple[str, int, int]:
    """Write a unit's shard again without repeated keys.

    Returns:
        the new name, the number of images left out, and the number of rows kept.
    """
    kept: list[Sample] = []
    num_left_out, is_kept = 0, True
    views = encoder.config.views if split == "train" else 1
    for place, row in enumerate(read_unit(part, split, name)):
        # Views follow their image and leave with it: their own keys (KEY@1, ...) are not in the hashes.
        if place % views == 0:
            is_kept = key_hash(row["key"]) not in repeated
            num_left_out += not is_kept
        if is_kept:
            kept.append(row)
    # Another name: a killed merge starts again from the unit, which must still be whole.
    name = f"{name}_once"
    if kept:
        write_rows(part, split, name, rows=kept, encoder=encoder)
    return name, num_left_out, len(kept)
