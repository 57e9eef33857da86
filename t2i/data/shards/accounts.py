"""The accounts of a shard folder: each entry of the source is kept, left out or broken, with plain reasons."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from t2i.data.shards.manifest import BROKEN, MANIFEST, Manifest
from t2i.errors import DataError

MOST_REASONS = 10
"""Reasons that are printed."""


def num_pairs(counts: Mapping[str, int], *, views: int) -> int:
    """Count the pairs of samples per split, of which train has `views` for each."""
    return sum(count // views if split == "train" else count for split, count in counts.items())


def check_accounts(manifest: Manifest, *, where: Path) -> None:
    """Check that each entry of the source was kept, left out or broken. Older manifests do not say so.

    Raises:
        DataError: the sum differs; the message has the numbers.
    """
    if manifest.seen is None or manifest.left_out is None:
        return
    views, broken = (manifest.prepare or {}).get("views", 1), manifest.broken or 0
    kept, left_out = (
        num_pairs(manifest.documents or manifest.counts, views=views),
        sum(manifest.left_out.values()),
    )
    if manifest.counts.get("train", 0) % views:
        raise DataError(
            f"{where} has {manifest.counts['train']} train samples; expected a multiple of {views} views."
        )
    total = kept + left_out + broken
    if total != manifest.seen:
        raise DataError(
            f"{where}: {kept} kept, {left_out} left out and {broken} broken are {total}; expected the"
            f" {manifest.seen} entries of {manifest.source}. This is an error of t2i: please report it."
        )
    if manifest.caption_tokens is not None and sum(manifest.caption_tokens.values()) != kept:
        found = sum(manifest.caption_tokens.values())
        raise DataError(f"{where}: caption_tokens counts {found} pairs; expected {kept}.")


def broken_reasons(folder: Path) -> Counter[str]:
    """Count the reasons in broken.jsonl.

    Raises:
        DataError: it is missing, or is not as it was written.
    """
    path = folder / BROKEN
    try:
        return by_kind(str(json.loads(line)["reason"]) for line in path.read_text().splitlines())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not as it was written: {error!r}.") from error


def by_kind(reasons: Iterable[str]) -> Counter[str]:
    """Count reasons that differ only in numbers as one, under the first of them."""
    # A decoder may say of each image how many bytes it lacks.
    kinds: dict[str, str] = {}
    return Counter(kinds.setdefault(re.sub(r"\d+", "", reason), reason) for reason in reasons)


def most_frequent(reasons: Mapping[str, int], *, most: int = MOST_REASONS) -> list[str]:
    """Write out the most frequent reasons: "3 times no caption"."""
    ordered = sorted(reasons.items(), key=lambda one: (-one[1], one[0]))
    lines = [f"{count:,} time{'s' * (count != 1)} {reason}" for reason, count in ordered[:most]]
    return lines + ([f"{len(ordered) - most:,} more reasons"] if len(ordered) > most else [])


def account_lines(folder: Path, manifest: Manifest) -> list[str]:
    """Say what became of a source's entries, with the files that have the rest."""
    return [
        *reason_lines("left out", manifest.left_out, file=folder / MANIFEST),
        *reason_lines("broken", broken_reasons(folder) if manifest.broken else None, file=folder / BROKEN),
        *reason_lines("kept, but changed", manifest.changed, file=folder / MANIFEST),
        *reason_lines("files not read to their end", manifest.unread, file=folder / MANIFEST),
    ]


def reason_lines(kind: str, reasons: Mapping[str, int] | None, *, file: Path | None = None) -> list[str]:
    """Write out one kind's most frequent reasons, each on a line; none if there are none."""
    if not reasons:
        return []
    listed = f"; all in {file}" if file else ""
    return [f"{kind} ({sum(reasons.values()):,}{listed}):", *(f"  {line}" for line in most_frequent(reasons))]
