"""Two scores side by side, if they were measured alike."""

from pathlib import Path
from typing import Any

from t2i.errors import UserError
from t2i.files import check_keys, read_json

SCORES = "scores.json"

PROTOCOL = (
    "data",
    "n",
    "features",
    "features_sha256",
    "resize",
    "reference",
    "reference_sha256",
    "crop",
    "image_size",
    "captions",
    "captions_sha256",
    "kernel_seed",
    "clip_sha256",
)
"""Entries of scores.json that must be equal, CLIP's where both have it."""

SUBJECT = (
    "checkpoint",
    "weights_sha256",
    "image_tokenizer_sha256",
    "sampler",
    "batch_size",
    "dtype",
    "device",
    "versions",
)
"""Entries that may differ, and are worth saying."""


def read_scores(file: Path) -> dict[str, Any]:
    """Read a scores.json, or that of a folder.

    Raises:
        UserError: it is none.
    """
    file = file / SCORES if file.is_dir() else file
    scores = read_json(file, error=UserError)
    check_keys(scores, {"rows": dict, "measures": list}, where=f"{file} is no scores.json", error=UserError)
    return scores


def check_protocols(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Stop where two scores were not measured alike.

    Raises:
        UserError: the entries that differ, one a line.
    """
    keys = tuple(key for key in PROTOCOL if key != "clip_sha256" or (key in a and key in b))
    lines = differences(a, b, keys=keys)
    if lines:
        raise UserError("These scores were measured by different protocols:\n" + "\n".join(lines))


def differences(a: dict[str, Any], b: dict[str, Any], *, keys: tuple[str, ...]) -> list[str]:
    """List entries that differ: `key: A | B`, nested ones as key.inner."""
    lines = []
    for key in keys:
        left, right = a.get(key, "not stated"), b.get(key, "not stated")
        if isinstance(left, dict) and isinstance(right, dict):
            inner = differences(left, right, keys=tuple({**left, **right}))
            lines += [f"{key}.{line}" for line in inner]
        elif left != right:
            lines.append(f"{key}: {left} | {right}")
    return lines


def table(scores: dict[str, Any]) -> list[str]:
    """Lay the rows out as lines: what, number of pictures, measures."""
    measures = scores["measures"]
    lines = [" ".join([f"{'pictures':56s}", f"{'n':>6s}", *(f"{key:>21s}" for key in measures)])]
    for row in scores["rows"].values():
        numbers = [f"{row[key]:21.4f}" if key in row else " " * 21 for key in measures]
        lines.append(" ".join([f"{row['what']:56s}", f"{row['n']:6d}", *numbers]).rstrip())
    return lines
