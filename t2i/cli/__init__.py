"""Command lines: a dataclass becomes flags, and a run file becomes flags before those of the command line.

Import from here: `from t2i.cli import parse`.
"""

from typing import Annotated

import tyro

from t2i.cli.command_line import parse, quiet_libraries, read_flags
from t2i.cli.run_file import flags_of, flags_of_mapping, is_kind, shown

CKPT = tyro.conf.arg(metavar="CKPT")
"""Marks a flag that names a model."""
Ckpt = Annotated[tyro.conf.Positional[str], CKPT]
"""A command's first word, which names a model."""

__all__ = [
    "CKPT",
    "Ckpt",
    "flags_of",
    "flags_of_mapping",
    "is_kind",
    "parse",
    "quiet_libraries",
    "read_flags",
    "shown",
]
