"""Rows of a table: JSON lines, comma- or tab-separated values, or parquet."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pyarrow.parquet as pq

from t2i.data.sources.source import parquet_errors
from t2i.errors import DataError
from t2i.files import parse_json

DIALECTS = {".csv": "excel", ".tsv": "excel-tab"}
TABLES = (".jsonl", ".parquet", *DIALECTS)


def read_table_rows(path: Path) -> Iterator[dict[str, object]]:
    """Read the rows of a table whose name ends in one of TABLES.

    Raises:
        DataError: a line is not a JSON object, or the table cannot be read.
    """
    if path.suffix == ".parquet":
        yield from _table(path)
        return
    # utf-8-sig: spreadsheet programs put a byte order mark first, which would be part of the first column's name.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.suffix in DIALECTS:
            yield from _separated(file, path)
        else:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parse_json(line, where=f"{path}: line {number}")


def _separated(file: TextIO, path: Path) -> Iterator[dict[str, object]]:
    """Read the rows below a header; in a table of one column a separator is part of the value."""
    reader = csv.DictReader(file, dialect=DIALECTS[path.suffix])
    try:
        for row in reader:
            rest = row.pop(None, [])  # csv puts values beyond the header here
            # A list of captions in one column is often written without quotes, and captions have commas.
            if len(row) == 1:
                row = {
                    name: reader.reader.dialect.delimiter.join([value, *rest]) for name, value in row.items()
                }
            elif rest:
                raise DataError(
                    f"{path}: line {reader.line_num} has {len(row) + len(rest)} values for the {len(row)} columns"
                    f" {', '.join(row)}; put quotes around a value that contains the separator."
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{path} is not a table of separated values: {error}.") from error


def _table(path: Path) -> list[dict[str, object]]:
    with parquet_errors(path):
        rows: list[dict[str, object]] = pq.read_table(path).to_pylist()
        return rows
