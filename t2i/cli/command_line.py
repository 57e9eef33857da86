"""Read this process's command line, and keep other libraries quiet."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from t2i.cli.names import check_left, check_names, flag_hints, flag_names
from t2i.cli.rules import REGISTRY, Refused
from t2i.cli.run_file import run_file_flags
from t2i.config.renamed import with_new_flags
from t2i.config.size import DEMO, PAPER, size_settings
from t2i.settings import check_values
from t2i.shipped import find_shipped
from t2i.verbs import RANK_FLAG, as_typed

T = TypeVar("T")
SIZE = "size"
"""The flag that stands for several."""


def parse(kind: type[T], *, description: str, has_run_file: bool = True) -> T:
    """Read this process's command line into a dataclass.

    `--config FILE.yaml` is a file of settings, which flags override. The deepspeed launcher's `--local_rank=N` is
    ignored.

    Args:
        has_run_file: False if --config is one of the command's own flags.

    Raises:
        UserError: an unknown flag or key, or a setting that is out of range or of another type.
        SystemExit: a flag is missing, or has no value; tyro has reported it, and the status is 2.
    """
    quiet_libraries()
    arguments = [word for word in sys.argv[1:] if not word.startswith(RANK_FLAG)]
    file = _config_file(arguments) if has_run_file else None
    # A run file as flags: one parser then checks types and names of both, and the last of two flags counts.
    flags = run_file_flags(find_shipped(Path(file)), kind=kind) if file else []
    words = [*flags, *arguments]
    if SIZE in flag_names(kind):
        words = _with_size(words)
    command = read_flags(kind, words, description=as_typed(description))
    check_values(command)
    return command


def read_flags(kind: type[T], words: Sequence[str], *, description: str = "") -> T:
    """Read flags into a dataclass, with a warning of old spellings.

    Raises:
        UserError: an unknown flag, a word too many, or a setting that is out of range or of another type.
        SystemExit: a flag is missing, or has no value; tyro has reported it.
    """
    renamed = with_new_flags([_at_home(word) for word in words])
    check_names(renamed, hints=flag_hints(kind))
    try:
        command, left = tyro.cli(
            kind, args=renamed, description=description, registry=REGISTRY, return_unknown_args=True
        )
    except Refused as refused:
        raise refused.error from None
    check_left(left, kind=type(command))  # of several kinds, the one that was chosen
    return command


def _config_file(arguments: list[str]) -> str | None:
    """Find the FILE of `--config FILE` or `--config=FILE`; None if it is missing, which tyro reports."""
    # By hand: the file's flags have to be known before tyro reads the whole line.
    found = None
    for place, word in enumerate(arguments):
        name, equals, value = _at_home(word).partition("=")
        if name == "--config":  # the last one counts, as of every flag
            found = value if equals else next(iter(arguments[place + 1 :]), None)
    return found


def _at_home(word: str) -> str:
    """Put the home folder in the place of `~`, which a shell leaves behind an equals sign, and in a run file."""
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{name}{equals}{os.path.expanduser(value)}" if value.startswith("~/") else word  # noqa: PTH111


def _with_size(words: list[str]) -> list[str]:
    """Put what `--size N` stands for behind it, so that later flags override it."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        name, _, value = word.partition("=")
        if name == f"--{SIZE}":
            value = value or next(rest, "")
            word = f"{name}={value}"
        found.append(word)
        # What is no number in range is refused by its field, with the range.
        if name == f"--{SIZE}" and value.isdecimal() and DEMO <= int(value) <= PAPER:
            found += [f"--{key}={number}" for key, number in size_settings(int(value)).items()]
    return found


def quiet_libraries() -> None:
    """Let other libraries log errors only, so that t2i's own lines can be read."""
    if sys.stderr is None or not sys.stderr.isatty():
        # Read where tqdm is imported. A log of days would hold a line of a hundred megabytes.
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    logging.basicConfig(level=logging.ERROR, format="%(message)s")  # some libraries log to the root itself
    logging.getLogger("t2i").setLevel(logging.INFO)
    for name in ("DeepSpeed", "streaming", "transformers", "huggingface_hub", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A filter, not a level: DeepSpeed sets its own level when it is imported, and plans are read from stdout.
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
