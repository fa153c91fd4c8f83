"""`vlm-tuning convert`: rows in any form that is recognised → the documented one, with images as they are stored."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, Protocol

import pyarrow
from datasets import Features, List
from datasets.features import Image, Value
from pyarrow import parquet
from tqdm import tqdm

from tuning.config.options import DataArguments
from tuning.config.parse import TYPES, coerce
from tuning.console import print0
from tuning.data.encode import wrong_number_of_images
from tuning.data.formats import describe_format
from tuning.data.from_config import image_rules
from tuning.data.images import EncodedImage, ImageRules, find_image
from tuning.data.messages import Message, count_images
from tuning.data.open_source import open_source
from tuning.data.sources import Row, Source
from tuning.errors import UserError, error_field
from tuning.exit_codes import exit_code_of

OPTIONS = (
    "dataset_text_field",
    "dataset_image_field",
    "dataset_split",
    "dataset_config_name",
    "image_folder",
    "allow_outside_paths",
    "allow_remote_images",
    "max_image_pixels",
    "max_image_megabytes",
)
PART = {"type": Value("string"), "text": Value("string")}
FEATURES = Features({"messages": List({"role": Value("string"), "content": List(PART)}), "images": List(Image())})
CHUNK_ROWS, CHUNK_BYTES = 1000, 64_000_000  # a parquet row group ends at either


class Writer(Protocol):
    """Writes rows in the canonical form, one by one, to a place of its own until `finish` puts them at `out`."""

    def write(self, messages: list[Message], images: list[EncodedImage]) -> None: ...

    def finish(self) -> None: ...


def convert(path: str, out: Path, data: DataArguments) -> int:
    """Write the rows of `path` to `out` in the canonical form. Returns how many.

    Raises `UserError` where `out` exists already or a row is bad; then nothing is left at `out` or beside it.
    """
    kind = WRITERS.get(out.suffix)
    if kind is None:
        raise UserError(
            where=str(out), problem=f"cannot write {out.suffix or 'this kind of'} files.", fix="Use .jsonl or .parquet."
        )
    _refuse_existing(out)
    source = open_source(
        path,
        text_field=data.dataset_text_field,
        image_field=data.dataset_image_field,
        split=data.dataset_split,
        config_name=data.dataset_config_name,
    )
    for sentence in dict.fromkeys(_describe_forms(source, data)):
        print0(f"Rows: {sentence}")
    rules = image_rules(data)
    with _blame_writing(out), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        writer = kind(out, Path(folder))
        for row in tqdm(_read_rows(source), total=len(source), desc="converting rows", unit="row"):
            writer.write(*read_row(row, rules))
        writer.finish()
    return len(source)


def read_row(row: Row, rules: ImageRules) -> tuple[list[Message], list[EncodedImage]]:
    """The canonical messages of a row and its images as they are stored. Raises `UserError` naming file, row, field."""
    conversation = row.format.read(row.columns, row.where)
    messages, stored = conversation.messages, conversation.images
    if any(message["role"] == "assistant" for message in messages[: conversation.trained_from]):
        field = row.format.text_fields[0]
        raise UserError(
            where=f"{row.where}, field '{field}'",
            problem="the prompt has assistant turns. They are context here, but the documented format trains them.",
            fix="Train on the data as it is.",
            field=field,
            kind="prompt with answers",
        )
    if count_images(messages) != len(stored):
        raise wrong_number_of_images(row, count_images(messages), len(stored))
    field = row.format.field_of_images
    with error_field(field):
        images = [
            find_image(image, row.folder, f"{row.where}, field '{field}', image {index}", rules)
            for index, image in enumerate(stored)
        ]
    return messages, images


def _read_rows(source: Source) -> Iterator[Row]:
    """All rows in order; `datasets` reads them in runs, which is several times as fast as by index."""
    for file in source.files:
        for number, columns in enumerate(file.rows):
            yield file.row(number, columns)


def _describe_forms(source: Source, data: DataArguments) -> Iterator[str]:
    for file in source.files:
        sentence = describe_format(file.format, data.dataset_text_field, data.dataset_image_field)
        yield sentence or "in the documented form already."


class JsonLines:
    """Rows as lines. An image file below the folder of `out` is named where it is; others are copied beside `out`."""

    def __init__(self, out: Path, folder: Path):
        self.out, self.copies = out, out.with_name(f"{out.stem}_images")
        self._root = os.path.realpath(out.parent)
        self._rows = 0
        self._copied = folder / "images"
        self._lines = folder / "lines"
        self._file = open(self._lines, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the writer)

    def write(self, messages: list[Message], images: list[EncodedImage]) -> None:
        paths = [self._name_in_place(image) or self._copy(image, n) for n, image in enumerate(images)]
        row = {"messages": messages, "images": paths}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._rows += 1

    def _name_in_place(self, image: EncodedImage) -> str | None:
        """The path that leads from `out` to the image's file; None where it has to be copied."""
        if isinstance(image.content, bytes):
            return None
        path = os.path.relpath(os.path.realpath(image.content), self._root)
        return None if path.startswith((f"..{os.sep}", "~", "data:")) else Path(path).as_posix()

    def _copy(self, image: EncodedImage, number: int) -> str:
        if not self._copied.exists():
            _refuse_existing(self.copies)
            self._copied.mkdir()
        name = f"{self._rows}_{number}.{image.format}"
        (self._copied / name).write_bytes(image.read())
        return f"{self.copies.name}/{name}"

    def finish(self) -> None:
        """Images first: lines in place name only images that are."""
        self._file.close()
        _refuse_existing(self.out)
        if not self._copied.exists():
            self._lines.rename(self.out)
            return
        _refuse_existing(self.copies)
        self._copied.rename(self.copies)
        try:
            self._lines.rename(self.out)
        except OSError:
            shutil.rmtree(self.copies)
            raise


class Parquet:
    """Rows in row groups, images embedded, with the `datasets` features; no more than a group is held in memory."""

    def __init__(self, out: Path, folder: Path):
        self.out, self._path = out, folder / "rows"
        self._writer = parquet.ParquetWriter(self._path, FEATURES.arrow_schema)
        self._held: list[dict[str, Any]] = []
        self._held_bytes = 0

    def write(self, messages: list[Message], images: list[EncodedImage]) -> None:
        encoded = [image.read() for image in images]
        stored = [{"bytes": data, "path": None} for data in encoded]
        self._held.append({"messages": messages, "images": stored})
        self._held_bytes += sum(map(len, encoded))
        if len(self._held) >= CHUNK_ROWS or self._held_bytes >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pyarrow.Table.from_pylist(self._held, schema=FEATURES.arrow_schema))
        self._held, self._held_bytes = [], 0

    def finish(self) -> None:
        if self._held:
            self._flush()
        self._writer.close()
        _refuse_existing(self.out)
        self._path.rename(self.out)


WRITERS: dict[str, type[JsonLines] | type[Parquet]] = {".jsonl": JsonLines, ".parquet": Parquet}


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UserError(where=str(path), problem="exists already.", fix="Give another name, or remove it.")


@contextmanager
def _blame_writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(where=str(out), problem=f"cannot be written: {error.strerror or error}.") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(where="convert", problem=f"{message}.", fix="--help lists the options.")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vlm-tuning convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("path", metavar="IN", help="The data: whatever training_data_path takes, in any form.")
    parser.add_argument("out", metavar="OUT", type=Path, help="Where it goes: a .jsonl or a .parquet file.")
    for entry in (entry for entry in fields(DataArguments) if entry.name in OPTIONS):
        value = f"{entry.default}".lower() if isinstance(entry.default, bool) else entry.default
        shown = "" if value is None else f" [{value}]"
        bare: dict[str, Any] = {"nargs": "?", "const": True} if isinstance(entry.default, bool) else {}
        parser.add_argument(
            f"--{entry.name}",
            type=_coerce_to(TYPES[entry.name]),
            default=entry.default,
            help=entry.metadata["help"] + shown,
            **bare,
        )
    return parser


def _coerce_to(kind: Any):
    def read(text: str) -> Any:
        try:
            return coerce(text, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def run(argv: Sequence[str]) -> None:
    """The whole command; says what was read and where it went."""
    options = vars(_make_parser().parse_args(argv))
    path, out = options.pop("path"), options.pop("out").expanduser()
    count = convert(path, out, DataArguments(**options))
    print0(f"{count:,} rows written to {out}.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
