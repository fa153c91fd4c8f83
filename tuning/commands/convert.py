"""`vlm-tuning convert`: turn a dataset of any format that training reads into the documented one.

Also one whose columns have a question and an answer under any name. Images stay as they are stored, byte for byte.
"""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Features, List
from datasets.features import Image, Value
from pyarrow import parquet
from tqdm import tqdm

from tuning.config.options import SourceArguments, option
from tuning.console import print0
from tuning.data.formats import RowFormat, describe_format
from tuning.data.from_config import check_config_name, image_rules, open_path
from tuning.data.images import EncodedImage, ImageRules, find_image
from tuning.data.messages import CALLS, THOUGHT, WEIGHT, Message, count_images, parse_json
from tuning.data.row_errors import wrong_number_of_images
from tuning.data.sources import Row, Source, read_file
from tuning.errors import UserError, error_field, writing


@dataclass(frozen=True)
class ConvertArguments(SourceArguments):
    data_path: str = option("", "The data, in any format that training reads.", required=True, positional="IN")
    output: str = option("", "File to write: .jsonl or .parquet.", required=True, positional="OUT")
    question_column: str | None = option(None, "Column with the question, where the data has no messages.")
    answer_column: str | None = option(None, "Column with the answer to it.")
    image_column: str | None = option(None, "Column with the image or images (default: images or image).")
    question: str | None = option(None, "The question of every row, where no column has it.")

    @property
    def format(self) -> RowFormat | None:
        """The format that the columns describe, if they are given."""
        if self.answer_column is None:
            return None
        columns = (self.question_column, self.answer_column) if self.question_column else (self.answer_column,)
        return RowFormat(columns, self.image_column, name="question and answer" if self.question_column else "answer")


OPTIONS = ConvertArguments
TEXT = Value("string")
KEYS_AS_TEXT = (THOUGHT, CALLS, "tool_call_id", "name")  # of a message in parquet; tool calls are JSON text
FURTHER_COLUMNS = ("tools", "chat_template_kwargs", "objects")  # in parquet JSON text, too
MESSAGE = {"role": TEXT, "content": List({"type": TEXT, "text": TEXT}), WEIGHT: Value("int8")}
FEATURES = Features({"messages": List(MESSAGE | dict.fromkeys(KEYS_AS_TEXT, TEXT)), "images": List(Image())})
CHUNK_ROWS, CHUNK_BYTES = 1000, 64_000_000  # a parquet row group ends when it has either


def convert(options: ConvertArguments) -> int:
    """Write all rows in the documented format. Returns their number.

    Raises `UserError` if the output exists or a row is bad; then nothing is left there or next to it.
    """
    out = Path(options.output).expanduser()
    make_writer = WRITERS.get(out.suffix)
    if make_writer is None:
        what = f"convert cannot write {out.suffix or 'this kind of'} files."
        raise UserError(where=str(out), problem=what, fix="Use .jsonl or .parquet.")
    _refuse_existing(out)
    _check_columns(options)
    check_config_name(options, [options.data_path])
    source = open_path(options, options.data_path, options.dataset_split, format=options.format)
    for sentence in dict.fromkeys(_describe_formats(source, options)):
        print0(f"Rows: {sentence}")
    rules = image_rules(options)
    with writing(out), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        further = {name for file in source.files for name in file.format.extra_columns}
        writer = make_writer(out, Path(folder), [name for name in FURTHER_COLUMNS if name in further])
        for row in tqdm(_read_rows(source), total=len(source), desc="converting rows", unit="row"):
            writer.write(read_row(row if options.format is None else _as_pair(row, options), rules))
        writer.finish()
    return len(source)


@dataclass(frozen=True)
class ConvertedRow:
    """A row in the documented format. `images`: as they are stored. `further`: those of `FURTHER_COLUMNS` it has."""

    messages: list[Message]
    images: list[EncodedImage]
    further: dict[str, Any]


def read_row(row: Row, rules: ImageRules) -> ConvertedRow:
    """The row in the documented format. Raises `UserError` naming file, row and field."""
    conversation = row.format.read(row.columns, row.where)
    messages, stored = conversation.messages, conversation.images
    if count_images(messages) != len(stored):
        raise wrong_number_of_images(row, count_images(messages), len(stored))
    field = row.format.field_of_images
    with error_field(field):
        images = [
            find_image(image, row.folder, f"{row.where}, field '{field}', image {index}", rules)
            for index, image in enumerate(stored)
        ]
    further = (conversation.tools, conversation.template_kwargs, parse_json(conversation.objects))
    named = {name: value for name, value in zip(FURTHER_COLUMNS, further, strict=True) if value}
    return ConvertedRow(messages, images, named)


def _check_columns(options: ConvertArguments) -> None:
    """Raise `UserError` unless question and answer are both given, or none of them."""
    questions = [name for name in ("question_column", "question") if getattr(options, name) is not None]
    given = [*questions, *(name for name in ("answer_column", "image_column") if getattr(options, name) is not None)]
    if given and (len(questions) != 1 or options.answer_column is None):
        raise UserError(
            where=", ".join(given),
            problem="a row needs one question and one answer.",
            fix="Give answer_column, and either question_column or question.",
        )


def _as_pair(row: Row, options: ConvertArguments) -> Row:
    """The row with the question of all rows, if there is one, and with numbers as text."""
    columns = {
        name: str(value) if name in row.format.text_fields and isinstance(value, (int, float)) else value
        for name, value in row.columns.items()
    }
    if options.question is None:
        return replace(row, columns=columns)
    format = replace(row.format, text_fields=("question", *row.format.text_fields))
    return replace(row, columns={**columns, "question": options.question}, format=format)


def _read_rows(source: Source) -> Iterator[Row]:
    """All rows in order."""
    for row in itertools.chain.from_iterable(map(read_file, source.files)):
        if isinstance(row, UserError):
            raise row
        yield row


def _describe_formats(source: Source, data: SourceArguments) -> Iterator[str]:
    for file in source.files:
        sentence = describe_format(file.format, data.dataset_text_field, data.dataset_image_field)
        yield sentence or "in the documented format already."


class JsonLines:
    """Writes rows as lines into `folder`, until `finish` moves them to `out`.

    A row names an image file where it is, if that is below the folder of `out`. Other images are copied next to `out`.
    """

    def __init__(self, out: Path, folder: Path, further: Sequence[str]):
        self.out, self.copies = out, out.with_name(f"{out.stem}_images")
        self._root = os.path.realpath(out.parent)
        self._rows = 0
        self._copied = folder / "images"
        self._lines = folder / "lines"
        self._file = open(self._lines, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the writer)

    def write(self, row: ConvertedRow) -> None:
        paths = [self._name_in_place(image) or self._copy(image, n) for n, image in enumerate(row.images)]
        self._file.write(json.dumps({"messages": row.messages, "images": paths, **row.further}, ensure_ascii=False))
        self._file.write("\n")
        self._rows += 1

    def _name_in_place(self, image: EncodedImage) -> str | None:
        """The path from `out` to the image's file; None if the image has to be copied."""
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
        """Move the images first: rows that are in their place must not name images that are not."""
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
    """Writes rows and their images into a parquet file in `folder`, until `finish` moves it to `out`.

    It has the features that `datasets` knows. `further`: those of `FURTHER_COLUMNS` that it has. At most one row group
    is held in memory.
    """

    def __init__(self, out: Path, folder: Path, further: Sequence[str]):
        self.out, self._path = out, folder / "rows"
        self._schema = Features({**FEATURES, **dict.fromkeys(further, TEXT)}).arrow_schema
        self._writer = parquet.ParquetWriter(self._path, self._schema)
        self._held: list[dict[str, Any]] = []
        self._held_bytes = 0

    def write(self, row: ConvertedRow) -> None:
        encoded = [image.read() for image in row.images]
        stored = [{"bytes": data, "path": None} for data in encoded]
        further = {name: json.dumps(value, ensure_ascii=False) for name, value in row.further.items()}
        self._held.append({"messages": list(map(self._flat, row.messages)), "images": stored, **further})
        self._held_bytes += sum(map(len, encoded))
        if len(self._held) >= CHUNK_ROWS or self._held_bytes >= CHUNK_BYTES:
            self._flush()

    def _flat(self, message: Message) -> dict[str, Any]:
        """The message as the columns of the file hold it."""
        if unknown := [name for name in message if name not in MESSAGE and name not in KEYS_AS_TEXT]:
            raise UserError(
                where=str(self.out),
                problem=f"messages have the key {unknown[0]!r}, for which .parquet has no column here.",
                fix="Write a .jsonl file.",
            )
        calls = {CALLS: json.dumps(message[CALLS], ensure_ascii=False)} if CALLS in message else {}
        return {**message, **calls}

    def _flush(self) -> None:
        self._writer.write_table(pyarrow.Table.from_pylist(self._held, schema=self._schema))
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
        raise UserError(where=str(path), problem="this path exists already.", fix="Give another name, or remove it.")


def run(options: ConvertArguments) -> None:
    """Convert, and print where the rows went."""
    print0(f"{convert(options):,} rows written to {Path(options.output).expanduser()}.")
