"""Rows of a table: JSON lines, comma- or tab-separated values, or parquet."""

import csv
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from t2i.data.sources.caption import mark_of
from t2i.errors import DataError
from t2i.files import parse_json

logger = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLES = (".jsonl", ".parquet", *SEPARATORS)
OTHER_SEPARATORS = (";", "\t")


def read_table_rows(path: Path) -> Iterator[dict[str, object]]:
    """Read the rows of a table whose name ends in one of TABLES.

    Bytes that are not UTF-8 stay in texts as lone surrogates, which read_captions decodes.

    Raises:
        DataError: a line is not a JSON object, or the table cannot be read.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _table(path)
            return
        with path.open("rb") as start:
            encoding = mark_of(start.read(4)) or "utf-8"
        with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
            if suffix in SEPARATORS:
                yield from _separated(file, path)
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield parse_json(line, where=f"{path}: line {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeError as error:  # a file that is marked as UTF-16 and is not
        raise DataError(f"{path} cannot be read: {error}.") from error


def choose_column(names: Sequence[str], *, asked: str, usual: tuple[str, ...], where: str, flag: str) -> str:
    """Find the column that was asked for, else the first of the usual ones.

    Raises:
        DataError: there is none, or there are two.
    """
    candidates = (asked,) if asked else usual
    found = next((name for name in candidates if name in names), None)
    if found is None:
        expected = ", ".join(candidates)
        raise DataError(f"{where} has the columns {', '.join(names)}; expected one of {expected} ({flag}).")
    if names.count(found) > 1:
        raise DataError(f"{where} has {names.count(found)} columns named {found}; expected one ({flag}).")
    return found


def is_url(value: object) -> bool:
    """Tell whether a cell holds an address on the network rather than a name or bytes."""
    return isinstance(value, str) and "://" in value[:16]


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors into a DataError.

    Raises:
        DataError: the file is not parquet, or is broken.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise DataError(f"{path} is not a parquet file, or is broken: {error}.") from error


def _separated(file: TextIO, path: Path) -> Iterator[dict[str, object]]:
    """Read the rows below a header; in a table of one column a separator is part of the value."""
    header = _header(file)
    usual = SEPARATORS[path.suffix.lower()]
    # Spreadsheet programs write semicolons where the comma is the decimal point.
    other = next((one for one in OTHER_SEPARATORS if usual not in header and one in header), usual)
    try:
        quoting = _quoting_of(file, path, delimiter=other)
        reader = csv.DictReader(file, delimiter=other, quoting=quoting, strict=True)
        repeated = [name for name, count in Counter(reader.fieldnames or []).items() if name and count > 1]
        if repeated:
            raise DataError(f"{path} has several columns named {', '.join(repeated)}; expected one of each.")
        for row in reader:
            rest = row.pop(None, [])  # csv puts values beyond the header here
            # A list of captions in one column is often written without quotes, and captions have commas.
            if len(row) == 1:
                row = {name: other.join([value, *rest]) for name, value in row.items()}
            elif rest:
                raise DataError(
                    f"{path}: line {reader.line_num} has {len(row) + len(rest)} values for the {len(row)} columns"
                    f" {', '.join(row)}; put quotes around a value that contains the separator."
                )
            yield row
    except csv.Error as error:
        raise DataError(
            f"{path} is not a table of separated values: {error}. A value with a quote in it must be in quotes, and its"
            " own quotes twice."
        ) from error


def _header(file: TextIO) -> str:
    """Read the first line that is not blank, and go back to it."""
    place = file.tell()
    line = file.readline()
    while line and not line.strip():
        place = file.tell()
        line = file.readline()
    file.seek(place)
    return line


def _quoting_of(file: TextIO, path: Path, *, delimiter: str) -> Literal[0, 3]:
    """Tell whether quotes hold values together, or are a part of them, as in many tables with tabs.

    A quote that is never closed would take all lines to the end of the file, or to the next such quote, for one value.
    """
    if delimiter != "\t":
        return csv.QUOTE_MINIMAL
    start = file.tell()
    try:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        are_held = not any("\n" in value and delimiter in value for row in rows for value in row)
    except csv.Error:
        are_held = False
    file.seek(start)
    if not are_held:
        logger.warning("%s: quotes are read as they stand, because not all of them are closed", path)
    return csv.QUOTE_MINIMAL if are_held else csv.QUOTE_NONE


def _table(path: Path) -> list[dict[str, object]]:
    with parquet_errors(path):
        rows: list[dict[str, object]] = pq.read_table(path).to_pylist()
        return rows
