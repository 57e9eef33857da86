"""Run files: YAML that becomes flags."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args, get_origin

from t2i.cli.names import flag_hints, is_switch, nearest, without_no
from t2i.config.renamed import with_new_flags
from t2i.errors import UserError
from t2i.files import read_yaml
from t2i.settings import Hint, bare, expected

RUN_FILE = "config"
"""The flag that names a run file, which no run file can do."""


def run_file_flags(file: Path, *, kind: type) -> list[str]:
    """Turn a run file into flags.

    Raises:
        UserError: a key of it is no flag of the command or is there twice, or a value is of another kind.
    """
    where, hints = f"--config {file}", flag_hints(kind)
    values = read_yaml(file, name=where)
    known: dict[str, str] = {}
    for key, value in _keys(values):
        (flag,) = with_new_flags([f"--{key}"])
        name = flag.removeprefix("--").replace("_", "-")
        _check(key, value, name=name, hints=hints, where=where)
        # One setting may be written in several ways, of which the last would silently count.
        if (before := known.get(setting := without_no(name))) is not None:
            twice = f"{key} twice" if before == key else f"{before} and {key}, which are one setting"
            raise UserError(f"{where} has {twice}; expected it once.")
        known[setting] = key
    return flags_of_mapping(values)


def _keys(values: Mapping[str, object], *, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _keys(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check(key: str, value: object, *, name: str, hints: Mapping[str, Hint], where: str) -> None:
    """Refuse a key that the command does not take, and a value of which no flag can be made."""
    if name == RUN_FILE:
        raise UserError(f"{where} has the key {key}; a run file names no other. Put both into one file.")
    if name in hints:
        if not is_kind(value, hints[name]):
            raise UserError(f"{where}: {key} is {shown(value)}; expected {expected(hints[name])}.")
        return
    if inside := sorted(other for other in hints if other.startswith(f"{name}.")):
        raise UserError(
            f"{where}: {key} is {shown(value)}; expected keys of its own, such as {inside[0].replace('-', '_')}."
        )
    close = nearest(key, set(hints), form="{}").replace("-", "_")
    raise UserError(f"{where} has the key {key}, which {sys.argv[0]} does not take{close}.")


def is_kind(value: object, hint: Hint) -> bool:
    """Tell whether YAML's value has the form that a flag takes; numbers and words are checked when they are read."""
    inner = bare(hint)
    if value is None:
        return type(None) in get_args(inner)
    if isinstance(value, bool) or is_switch(hint):
        return isinstance(value, bool) and is_switch(hint)
    if isinstance(value, list):
        return get_origin(inner) is tuple and not any(
            isinstance(one, bool | list | dict | None) for one in value
        )
    return True


def shown(value: object) -> str:
    """Write a value for a sentence that refuses it."""
    return "empty" if value is None else repr(value)


def flags_of(file: Path) -> list[str]:
    """Turn a run file into flags: {data: {seq_len: 96}} -> --data.seq_len 96.

    Raises:
        UserError: no such file, or it holds no mapping of keys.
    """
    return flags_of_mapping(read_yaml(file, name=f"--config {file}"))


def flags_of_mapping(values: Mapping[str, object]) -> list[str]:
    """Turn nested keys into flags: {data: {seq_len: 96}} -> --data.seq_len 96; a list becomes several words."""
    return _flags(values, prefix="--")


def _flags(values: Mapping[str, object], *, prefix: str) -> list[str]:
    flags: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            flags += _flags(value, prefix=f"{prefix}{key}.")
        # Before other values: tyro's switches take no value but a `no-`.
        elif isinstance(value, bool):
            flags.append(f"{prefix}{key}" if value else f"{prefix}{_negated(str(key))}")
        elif str(value).startswith("-"):  # else it would be read as a flag of its own
            flags.append(f"{prefix}{key}={value}")
        else:
            words = value if isinstance(value, list) else [value]
            flags += [f"{prefix}{key}", *map(str, words)]
    return flags


def _negated(key: str) -> str:
    head, _, tail = key.rpartition(".")
    return f"{head}.no-{tail}" if head else f"no-{tail}"
