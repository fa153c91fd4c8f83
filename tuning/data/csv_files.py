"""Reads tables of text: comma-separated (.csv) and tab-separated (.tsv) files, plain or compressed with gzip."""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuning.data.json_files import BYTE_ORDER_MARK, decode, open_bytes
from tuning.errors import UserError

LARGEST_CELL = 2**31 - 1  # Python's limit of 131,072 characters would refuse images in base64


def read_csv(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table whose first line names the columns. Every cell stays text, an empty one is None.

    A .csv file may be separated by semicolons, as spreadsheets write it in many countries. Raises `UserError` with the
    number of a row that has too many or too few cells, or of a line that is not in UTF-8.
    """
    csv.field_size_limit(LARGEST_CELL)
    with open_bytes(file) as lines:
        first = lines.readline().removeprefix(BYTE_ORDER_MARK)
        is_tsv = file.name.lower().removesuffix(".gz").endswith(".tsv")
        delimiter = "\t" if is_tsv else ";" if b";" in first and b"," not in first else ","
        numbered = enumerate(itertools.chain([first], lines), 1)
        texts = (decode(line, f"{file}, line {number}") for number, line in numbered)
        table = (cells for cells in csv.reader(texts, delimiter=delimiter, strict=True) if cells)
        number = -1  # the names of the columns stand before row 0
        try:
            names = _check_names(next(table, []), file)
            for number, cells in enumerate(table):
                yield _make_row(names, cells, f"{file}, row {number}")
        except csv.Error as fault:
            raise UserError(
                where=f"{file}, row {number + 1}",
                problem=f"the row cannot be read: {fault}.",
                fix='Put a cell that contains a quote in quotes, and double the quote inside ("").',
                kind="unreadable",
            ) from fault


def _make_row(names: list[str], cells: list[str], where: str) -> dict[str, Any]:
    if len(cells) != len(names):
        raise UserError(
            where=where,
            problem=f"there are {len(cells)} cells, but {len(names)} columns.",
            fix="Put a cell that contains the separator in quotes.",
            kind="unreadable",
        )
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _check_names(names: list[str], file: Path) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(where=str(file), problem=f"several columns are called '{twice[0]}'.", fix="Rename them.")
    return names
