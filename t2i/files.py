"""JSON and YAML that a stranger may have written: plain values with the wanted keys, or a sentence."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
import yaml

from t2i.errors import CheckpointError, DataError, UserError

Kind = type | tuple[type, ...] | dict[str, Any]
"""What a key must hold: a type, one of several, or an object with keys of its own."""
Refusal = type[UserError] | type[CheckpointError]

REASON_CHARACTERS = 200
"""Of a library's own words on what it could not read."""

HASH = "xxh64"
"""The hash in the index of shards, checked when they are downloaded and by --check."""


class _NoAliases(yaml.SafeLoader):
    """A safe loader that refuses `*name`: a few lines of aliases can stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it has an alias, *{self.peek_event().anchor}, which is not read")
        return super().compose_node(parent, index)


def parse_json(text: bytes | str, *, where: Path | str, error: Refusal = DataError) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        error: it is none; the sentence begins with `where`.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as broken:
        raise error(f"{where} is no JSON: {_reason(broken)}.") from broken
    if not isinstance(values, dict):
        raise error(f"{where} holds {type(values).__name__}; wanted is an object of keys.")
    return values


def read_json(path: Path, *, error: Refusal = DataError) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        error: it cannot be read, or holds something else.
    """
    try:
        text = path.read_bytes()
    except OSError as failed:
        raise error(f"{path} cannot be read: {failed.strerror}.") from failed
    return parse_json(text, where=path, error=error)


def read_optional_json(path: Path, *, error: Refusal = DataError) -> dict[str, Any]:
    """Read a file that holds a JSON object; without the file there are no keys.

    Raises:
        error: it cannot be read, or holds something else.
    """
    return read_json(path, error=error) if path.is_file() else {}


def read_yaml(path: Path, *, name: str) -> dict[str, Any]:
    """Read a file that holds a YAML mapping, without running anything.

    Args:
        name: what the file is called in errors, such as `--config x.yaml`.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        values = yaml.load(path.read_bytes(), Loader=_NoAliases)  # a SafeLoader
    except OSError as failed:
        raise UserError(f"{name} cannot be read: {failed.strerror}.") from failed
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as broken:
        raise UserError(f"{name} is no YAML: {_reason(broken)}.") from broken
    if not isinstance(values, dict):
        raise UserError(f"{name} holds {type(values).__name__}; wanted is a mapping of keys.")
    return values


def check_keys(
    values: dict[str, Any], wanted: dict[str, Kind], *, where: Path | str, error: Refusal = DataError
) -> None:
    """Check that keys are there and hold what they must.

    Raises:
        error: the first key that does not.
    """
    for key, kind in wanted.items():
        value = values.get(key)
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                raise error(f"{where}: {key} is {value!r:.80}; wanted is an object of keys.")
            check_keys(value, kind, where=f"{where}: {key}", error=error)
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(one.__name__ for one in kinds)
            raise error(f"{where}: {key} is {value!r:.80}; wanted is {names}.")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all; of several processes that write it, on whichever machine, one is kept."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(value, indent=1))


def is_inside(name: str) -> bool:
    """Tell whether a name that a file gives stays in that file's folder."""
    path = Path(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _reason(broken: Exception) -> str:
    text = " ".join(str(broken).split()) or type(broken).__name__
    return text[:REASON_CHARACTERS].rstrip(".")


def sha256_of(file: Path) -> str:
    """Hash a file (hex)."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder to write into, which becomes `out` when all went well.

    Raises:
        UserError: `out` exists.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already; choose another.")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
