"""Reads JSON lines and JSON files, plain or compressed with gzip."""

import ast
import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from tuning.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def open_bytes(file: Path) -> IO[bytes]:
    """Open a file to read its bytes. A name that ends with .gz is decompressed."""
    return cast(IO[bytes], gzip.open(file)) if file.suffix.lower() == ".gz" else open(file, "rb")


def read_json(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, or of a JSON file with a list of rows. Passes over empty lines.

    Raises `UserError` with the number of a row that is no JSON object, is not in UTF-8, or has half a character.
    """
    with open_bytes(file) as lines:
        filled = (line for line in lines if line.strip().removeprefix(BYTE_ORDER_MARK))
        first = next(filled, b"").removeprefix(BYTE_ORDER_MARK)
        if _is_one_document(first, file):
            yield from _read_document(first + lines.read(), file)
            return
        for number, line in enumerate(itertools.chain([first] if first else [], filled)):
            yield parse_row(line, f"{file}, row {number}")


def _is_one_document(first_line: bytes, file: Path) -> bool:
    """Whether a file is one JSON value: a list, or an object over several lines. Else it has an object in each line."""
    if first_line.lstrip().startswith(b"["):
        return True
    is_json = file.name.lower().removesuffix(".gz").endswith(".json")
    try:
        return is_json and not isinstance(json.loads(first_line), dict)
    except ValueError:
        return is_json


def _read_document(data: bytes, file: Path) -> Iterator[dict[str, Any]]:
    kind = file.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        value = json.loads(decode(data, str(file)))
    except json.JSONDecodeError as fault:
        raise UserError(
            where=str(file),
            problem=f"the file cannot be read as {kind}: {fault.msg} (line {fault.lineno}, column {fault.colno}).",
            fix="Repair the file.",
        ) from fault
    has_surrogates = _has_surrogates(data)
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        yield _check_row(row, f"{file}, row {number}", has_surrogates=has_surrogates)


def parse_row(text: bytes, where: str) -> dict[str, Any]:
    """The row in a text of JSON. Raises `UserError` where it has none."""
    try:
        value = json.loads(decode(text, where))
    except json.JSONDecodeError as fault:
        raise UserError(
            where=where,
            problem=f"the line is not valid JSON: {fault.msg} (column {fault.colno}).",
            fix="Repair the line.",
            kind="unreadable",
        ) from fault
    return _check_row(value, where, has_surrogates=_has_surrogates(text))


def decode(data: bytes, where: str) -> str:
    """The text of bytes in UTF-8. Raises `UserError` where they are none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise UserError(
            where=where,
            problem=f"the text is not UTF-8: byte 0x{data[fault.start]:02x} at position {fault.start}.",
            fix="Save the file in UTF-8.",
            kind="unreadable",
        ) from fault


def _has_surrogates(data: bytes) -> bool:
    return b"\\ud" in data or b"\\uD" in data


def _check_row(value: Any, where: str, *, has_surrogates: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            where=where,
            problem=f"expected a JSON object, found {type(value).__name__} {str(value)[:60]}.",
            fix="Give every row an object with the columns as keys.",
            kind="unreadable",
        )
    if has_surrogates:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as fault:
            raise UserError(
                where=where,
                problem=f"a text has half a character: \\u{ord(fault.object[fault.start]):04x} without its other half.",
                fix="Repair the text: it was cut inside a character.",
                kind="unreadable",
            ) from fault
    return value


def parse_list(value: Any) -> list[Any] | None:
    """The list in a text of JSON, or as Python writes it (pandas in a .csv). None where there is none."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        found = json.loads(value)
    except ValueError:
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return found if isinstance(found, list) else None
