"""Run files: YAML that becomes flags."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from t2i.cli.names import flag_names, nearest
from t2i.config.renamed import RENAMED
from t2i.errors import UserError
from t2i.files import read_yaml


def run_file_flags(file: Path, *, kind: type) -> list[str]:
    """Turn a run file into flags.

    Raises:
        UserError: a key of it is no flag of the command.
    """
    flags, known = flags_of(file), flag_names(kind)
    old = {name.replace("_", "-") for name in RENAMED}
    for key in _keys(read_yaml(file, name=f"--config {file}")):
        if key.replace("_", "-") not in known | old:
            raise UserError(
                f"--config {file} has the key {key}, which {sys.argv[0]} does not take"
                f"{nearest(key, known, form='{}').replace('-', '_')}."
            )
    return flags


def _keys(values: Mapping[str, object], *, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield from _keys(value, prefix=f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


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
            flags.append(f"{prefix}{key}" if value else f"{prefix}{_negated(key)}")
        else:
            words = value if isinstance(value, list) else [value]
            flags += [f"{prefix}{key}", *map(str, words)]
    return flags


def _negated(key: str) -> str:
    head, _, tail = key.rpartition(".")
    return f"{head}.no-{tail}" if head else f"no-{tail}"
