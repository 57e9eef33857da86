"""Command lines: a dataclass becomes flags, and a run file becomes flags before those of the command line."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from t2i.config.renamed import with_new_flags
from t2i.errors import UserError
from t2i.files import read_yaml
from t2i.settings import check_values, has_range, hints_of, range_of, texts_of
from t2i.shipped import find_shipped
from t2i.verbs import RANK_FLAG, as_typed

T = TypeVar("T")

REGISTRY = ConstructorRegistry()
"""How tyro reads our dataclasses: as by its own rule, with the range of a setting after its text."""


def parse(kind: type[T], *, description: str, has_run_file: bool = True) -> T:
    """Read this process's command line into a dataclass.

    `--config FILE.yaml` is a file of settings, which flags override. The deepspeed launcher's `--local_rank=N` is
    ignored.

    Args:
        has_run_file: False if --config is one of the command's own flags.

    Raises:
        UserError: a setting is out of range.
        SystemExit: an unknown flag or a value of another type; tyro has reported it, and the status is 2.
    """
    quiet_libraries()
    arguments = [word for word in sys.argv[1:] if not word.startswith(RANK_FLAG)]
    file = _config_file(arguments) if has_run_file else None
    # A run file as flags: one parser then checks types and names of both, and the last of two flags counts.
    flags = flags_of(find_shipped(Path(file))) if file else []
    command = read_flags(kind, [*flags, *arguments], description=as_typed(description))
    check_values(command)
    return command


def read_flags(kind: type[T], words: Sequence[str], *, description: str = "") -> T:
    """Read flags into a dataclass, with a warning of old spellings.

    Raises:
        UserError: a setting is out of range.
        SystemExit: an unknown flag or a value of another type; tyro has reported it.
    """
    try:
        return tyro.cli(kind, args=with_new_flags(words), description=description, registry=REGISTRY)
    except _Refused as refused:
        raise refused.error from None


class _Refused(Exception):
    """A dataclass refused its values."""

    # Not a UserError: that is a ValueError, which tyro would put into a frame of its own among its usage text.

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.error = error


@REGISTRY.struct_rule
def _with_ranges(info: StructTypeInfo) -> StructConstructorSpec | None:
    # tyro's own dataclass is generic; ours have no parameters.
    if not is_dataclass(info.type) or getattr(info.type, "__parameters__", None):
        return None
    hints = hints_of(info.type)
    return StructConstructorSpec(
        instantiate=partial(_made, info.type),
        fields=tuple(
            StructFieldSpec(
                name=one.name,
                type=hints[one.name],
                default=_default(one, info.default),
                helptext=partial(_help, info.type, one.name),
            )
            for one in fields(info.type)
        ),
    )


def _made(kind: type[T], **values: object) -> T:
    try:
        return kind(**values)
    except UserError as error:
        raise _Refused(error) from error


def _default(one: "Field[object]", given: object) -> object:
    """Find a field's default: that of the instance given for the whole group, else its own."""
    if is_dataclass(given):
        return getattr(given, one.name)
    if one.default is not MISSING:
        return one.default
    return tyro.MISSING if one.default_factory is MISSING else one.default_factory()


def _help(kind: type, name: str) -> str:
    """Return a field's text and range for --help; a group has the text of its class."""
    hint = hints_of(kind)[name]
    text = as_typed(texts_of(kind).get(name) or (is_dataclass(hint) and hint.__doc__) or "")
    words = range_of(hint) if has_range(hint) else ""  # of tyro's own marks there are no words
    return f"{text} ({words})" if words else text


def _config_file(arguments: list[str]) -> str | None:
    """Find the FILE of `--config FILE` or `--config=FILE`; None if it is missing, which tyro reports."""
    # By hand: the file's flags have to be known before tyro reads the whole line.
    for place, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name == "--config":
            return value or next(iter(arguments[place + 1 :]), None)
    return None


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


def quiet_libraries() -> None:
    """Let other libraries log errors only, so that t2i's own lines can be read."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")  # some libraries log to the root itself
    logging.getLogger("t2i").setLevel(logging.INFO)
    for name in ("DeepSpeed", "streaming", "transformers", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A filter, not a level: DeepSpeed sets its own level when it is imported, and plans are read from stdout.
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
