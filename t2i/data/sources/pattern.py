"""Files by a path with braces and globs: shards/{00000..00041}.tar, {a,b}/*.parquet."""

import re
from collections.abc import Iterator
from pathlib import Path

from t2i.errors import DataError

GLOB_CHARACTERS = frozenset("*?[")


def expand(pattern: str) -> list[Path]:
    """List the files that a pattern names, braces in their order, globs sorted, each file once.

    Raises:
        DataError: a part of the pattern names no file.
    """
    files: list[Path] = []
    for one in braces(pattern):
        path = Path(one)
        has_glob = not GLOB_CHARACTERS.isdisjoint(one)
        found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if has_glob else [path]
        if not found or not all(file.is_file() for file in found):
            raise DataError(
                f"--source {one} is neither `openmoji`, a file, a folder that exists, coco:DIR, nor a Hugging Face"
                " data set (USER/NAME, or hf: before any name)."
            )
        files += found
    return list(dict.fromkeys(files))


def braces(pattern: str) -> Iterator[str]:
    """Write out a pattern's braces, numbers padded as the first is; the first braces vary slowest."""
    match = re.search(r"\{([^{}]+)\}", pattern)
    if match is None:
        yield pattern
        return
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends:
        choices = [f"{number:0{len(ends[1])}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from braces(pattern[: match.start()] + choice + pattern[match.end() :])
