"""Command lines: dataclasses to flags, run files as flags put before them."""

import logging
import sys
from pathlib import Path
from typing import Any, TypeVar

import tyro

from t2i.errors import UserError
from t2i.files import read_yaml

T = TypeVar("T")


def parse(kind: type[T], *, description: str, has_run_file: bool = True) -> T:
    """Read this process's command line into a dataclass.

    `--config FILE.yaml` holds flags written down; the command line wins over it. The deepspeed launcher's own
    `--local_rank=N` is passed over.

    Args:
        has_run_file: False where --config is a flag of the command's own.
    """
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    file = _config_file(arguments) if has_run_file else None
    flags = flags_of(Path(file)) if file else []
    try:
        command = tyro.cli(kind, args=[*flags, *arguments], description=description)
    except ValueError as error:  # a dataclass refused a value
        raise UserError(str(error)) from error
    quiet_libraries()
    return command


def _config_file(arguments: list[str]) -> str | None:
    """Find what `--config FILE` or `--config=FILE` names; None where there is none, and tyro says what is wrong."""
    for place, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name == "--config":
            return value or next(iter(arguments[place + 1 :]), None)
    return None


def flags_of(file: Path) -> list[str]:
    """Write a run file out as flags: {data: {seq_len: 96}} -> --data.seq_len 96.

    Raises:
        UserError: no such file, or no mapping of keys in it.
    """
    return flags_of_mapping(read_yaml(file, name=f"--config {file}"))


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
        else:
            words = value if isinstance(value, list) else [value]
            flags += [f"{prefix}{key}", *map(str, words)]
    return flags


def _negated(key: str) -> str:
    head, _, tail = key.rpartition(".")
    return f"{head}.no-{tail}" if head else f"no-{tail}"


def quiet_libraries() -> None:
    """Turn other libraries' chatter down to errors; t2i's own lines are plain sentences."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")  # some libraries log to the root itself
    logging.getLogger("t2i").setLevel(logging.INFO)
    for name in ("DeepSpeed", "streaming", "transformers", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # which sets a level of its own when it is imported


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
