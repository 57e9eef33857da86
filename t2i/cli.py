"""Command lines: dataclasses to flags, run files as flags put before them."""

import logging
import sys
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from t2i.errors import UserError

T = TypeVar("T")


def parse(kind: type[T], *, description: str) -> T:
    """Read this process's command line into a dataclass.

    `--config FILE.yaml` holds flags written down; the command line wins over it. The deepspeed launcher's own
    `--local_rank=N` is passed over.
    """
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    place = arguments.index("--config") + 1 if "--config" in arguments else len(arguments)
    file = arguments[place] if place < len(arguments) else None
    flags = flags_of(Path(file)) if file else []
    command = tyro.cli(kind, args=[*flags, *arguments], description=description)
    quiet_libraries()
    return command


def flags_of(file: Path) -> list[str]:
    """Write a run file out as flags: {data: {seq_len: 96}} -> --data.seq_len 96.

    Raises:
        UserError: no such file, or no mapping of keys in it.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"--config {file} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {file} is no YAML: {error}.") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {file} holds {type(values).__name__}; wanted is a mapping of keys.")
    return flags_of_mapping(values)


def flags_of_mapping(values: dict[str, Any]) -> list[str]:
    """Write nested keys out as flags: {data: {seq_len: 96}} -> --data.seq_len 96; a list is several words."""
    return _flags(values, prefix="--")


def _flags(values: dict[str, Any], *, prefix: str) -> list[str]:
    flags: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            flags += _flags(value, prefix=f"{prefix}{key}.")
        elif isinstance(value, bool):
            flags.append(f"{prefix}{key}" if value else f"{prefix}{_negated(key)}")
        elif isinstance(value, list):
            flags += [f"{prefix}{key}", *map(str, value)]
        else:
            flags += [f"{prefix}{key}", str(value)]
    return flags


def _negated(key: str) -> str:
    head, _, tail = key.rpartition(".")
    return f"{head}.no-{tail}" if head else f"no-{tail}"


def quiet_libraries() -> None:
    """Turn other libraries' chatter down to warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("DeepSpeed", "streaming", "transformers", "torch", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
