"""Patterns of file names, with braces and globs, and what the keys of each file begin with."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from t2i.errors import DataError, UserError

BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
"""{00..12} or {a,b}; as in a shell, {a} is plain text."""
GLOB_CHARACTERS = frozenset("*?[")
MAX_FILES = 1_000_000
"""A range of braces that names more is a slip of the keyboard."""


def expand(pattern: str) -> list[Path]:
    """List the files that a pattern names, each once: braces in their order, globs sorted.

    A file, or a folder on the way, whose name has brackets or braces is found by this very name first.

    Raises:
        DataError: a part of the pattern matches no file.
        UserError: its braces name too many.
    """
    if Path(pattern).is_file():
        return [Path(pattern)]
    files: list[Path] = []
    for one in braces(pattern):
        found = _globbed(Path(one))
        other = next((path for path in found if not path.is_file()), None)
        if other is not None and other != Path(one):
            raise DataError(f"--source {pattern} names {other}, which is not a file; expected files.")
        if not found or other is not None:
            raise DataError(
                f"--source {one} is not `openmoji`, an existing file or folder, coco:DIR, iconify:DIR, ids:DIR,"
                " text:NAME, or a Hugging Face dataset (hf:USER/NAME)."
            )
        files += found
    return list(dict.fromkeys(files))


def expand_any(pattern: str) -> list[Path]:
    """List the files and folders that a pattern names, each once.

    Raises:
        DataError: a part of the pattern matches nothing.
    """
    if Path(pattern).exists():
        return [Path(pattern)]
    found: list[Path] = []
    for one in braces(pattern):
        places = [path for path in _globbed(Path(one)) if path.exists()]
        if not places:
            raise DataError(f"--source names {one}, which is no existing file or folder.")
        found += places
    return list(dict.fromkeys(found))


def braces(pattern: str) -> Iterator[str]:
    """Expand a pattern's braces; numbers are padded like the first one, and the first braces vary slowest."""
    match = next((one for one in BRACES.finditer(pattern) if not _is_literal(pattern, one)), None)
    if match is None:
        yield pattern
        return
    for choice in _choices(match):
        yield from braces(pattern[: match.start()] + choice + pattern[match.end() :])


def key_prefixes(paths: list[Path], *, pattern: str) -> dict[Path, str]:
    """Name what the keys of each file begin with: FOLDER/FILE, without the file's ending.

    FOLDER is what the pattern leaves open above the file, else the folder that the files are in. So files of one name
    in two folders have other keys, and a file keeps its own when others are added.
    """
    fixed = _fixed_part(pattern)
    # The folder's own name where the pattern names it: two downloads number their files alike.
    name = Path(os.path.normpath(fixed.absolute())).name
    prefixes = {}
    for path in paths:
        relative = path.relative_to(fixed) if path.is_relative_to(fixed) else Path(path.name)
        stem = relative.with_suffix("").as_posix()
        prefixes[path] = stem if len(relative.parts) > 1 else f"{name}/{stem}"
    return prefixes


def _fixed_part(pattern: str) -> Path:
    """Return the folder that a pattern names before its first glob or braces, or the folder itself."""
    whole = Path(pattern)
    if whole.is_dir():
        return whole
    if whole.is_file():
        return whole.parent
    fixed = Path(whole.anchor)
    for part in whole.relative_to(whole.anchor).parts[:-1]:
        if not (fixed / part).is_dir():
            break
        fixed /= part
    return fixed


def _is_literal(pattern: str, match: re.Match[str]) -> bool:
    """Tell whether braces are part of the name of a folder that exists."""
    end = pattern.find("/", match.end())
    return end >= 0 and Path(pattern[:end]).is_dir()


def _choices(match: re.Match[str]) -> list[str]:
    if match[1] is None:
        return match[3].split(",")
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MAX_FILES:
        raise UserError(f"--source has the range {match[0]}; expected at most {MAX_FILES:,} files.")
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return [f"{number:0{len(match[1])}d}" for number in numbers]


def _globbed(path: Path) -> list[Path]:
    """Expand a path's globs, one part after the other; a part that exists is taken literally."""
    if GLOB_CHARACTERS.isdisjoint(str(path)):
        return [path]
    found = [Path(path.anchor)]
    for part in path.relative_to(path.anchor).parts:
        has_glob = not GLOB_CHARACTERS.isdisjoint(part)
        found = [
            one
            for folder in found
            for one in (
                _matches(folder, part) if has_glob and not (folder / part).exists() else [folder / part]
            )
        ]
    # What a glob has reached may lack the rest of the path.
    return sorted(one for one in found if one.exists())


def _matches(folder: Path, part: str) -> list[Path]:
    # As in a shell, * is no hidden file: macOS leaves ._a.tar beside a.tar.
    return [one for one in folder.glob(part) if part.startswith(".") or not one.name.startswith(".")]
