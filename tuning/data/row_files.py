"""Files that we read ourselves, row by row: converted to Arrow once, or streamed.

The values of a row stay what they are in the file. `datasets` would guess a type for each column from the first 10 MB,
fail where later rows differ, and turn an answer such as "42" into a number where other rows hold a list.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow
from datasets.builder import Key
from datasets.features import Image, List
from datasets.features.features import register_feature

from tuning.data.csv_files import read_csv
from tuning.data.json_files import read_json
from tuning.data.tar_files import IMAGES, read_tar
from tuning.errors import UserError

Reader = Callable[[Path], Iterator[dict[str, Any]]]
"""Reads the rows of a file. Raises `UserError` that names the row which cannot be read."""

READERS: dict[str, Reader] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz"), read_json),
    **dict.fromkeys((".csv", ".tsv", ".csv.gz", ".tsv.gz"), read_csv),
    ".tar": read_tar,
}
VERSION = 1  # raise it when a reader reads the same file differently: then it is converted again
CHUNK_ROWS, CHUNK_BYTES = 1000, 32_000_000  # a table ends when it has either
ENCODED_IMAGES = List(Image(decode=False))


@dataclass
class JsonText:
    """A feature of `datasets` whose values are any JSON, kept as text.

    `datasets.Json` is no choice: it keeps the text "42" as a number, drops half characters, and refuses large numbers.
    """

    pa_type: ClassVar[Any] = pyarrow.large_string()
    id: str | None = field(default=None, repr=False)
    _type: str = field(default="JsonText", init=False, repr=False)

    def __call__(self) -> pyarrow.DataType:
        return self.pa_type

    def decode_example(self, value: str | None, token_per_repo_id: object = None) -> Any:
        """The value of a row."""
        return None if value is None else json.loads(value)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the function is experimental
    register_feature(JsonText, "JsonText")


def open_converted(file: Path, reader: Reader) -> datasets.Dataset:
    """The rows of a file, converted to Arrow unless that was done before."""
    state = file.stat()
    same = [str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, reader.__name__, VERSION]
    builder = RowFile(config_id=hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16], file=file, reader=reader)
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def open_streamed(file: Path, reader: Reader) -> datasets.IterableDataset:
    """The rows of a file, one after another. Rows may have different columns."""
    return datasets.IterableDataset.from_generator(partial(reader, file))


def read_streamed(rows: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of a stream. In a data worker `datasets` would give each worker other rows, and most workers none."""
    return ({name: values[0] for name, values in batch.items()} for batch in rows.iter(batch_size=1))


def pick_columns(
    rows: datasets.IterableDataset, columns: Sequence[str], instead: Mapping[str, str], optional: Sequence[str]
) -> Any:
    """Streamed rows with these columns, None where a row has none. `instead`: a column → what may take its place.

    A row without an `optional` column does not get it.
    """
    picked = partial(_pick, rows, tuple(columns), dict(instead), tuple(optional))
    return datasets.IterableDataset.from_generator(picked)


def _pick(
    rows: datasets.IterableDataset, columns: tuple[str, ...], instead: dict[str, str], optional: tuple[str, ...]
) -> Iterator[dict]:
    for row in read_streamed(rows):
        present = {name: row[name] for name in optional if name in row}
        yield {name: row.get(name, row.get(instead.get(name, name))) for name in columns} | present


@dataclass
class RowFileConfig(datasets.BuilderConfig):
    """`file` is read by `reader`."""

    file: Path = Path()
    reader: Reader = read_json


class RowFile(datasets.ArrowBasedBuilder):
    """Converts a file to Arrow."""

    BUILDER_CONFIG_CLASS = RowFileConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        """Read all rows for the names of their columns: a table has the columns of all rows."""
        names = dict.fromkeys(name for row in self._read() for name in row)
        if not names:
            raise UserError(
                where=str(self.config.file), problem="there are no rows.", fix="Give data with at least one row."
            )
        is_tar = self.config.reader is read_tar
        self.info.features = datasets.Features(
            {name: ENCODED_IMAGES if is_tar and name == IMAGES else JsonText() for name in names}
        )
        return [datasets.SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[Key, pyarrow.Table]]:
        schema = self.info.features.arrow_schema
        for number, rows in enumerate(self._read_chunks()):
            yield Key(0, number), pyarrow.Table.from_pylist(rows, schema=schema)

    def _read(self) -> Iterator[dict[str, Any]]:
        return self.config.reader(self.config.file)

    def _read_chunks(self) -> Iterator[list[dict[str, Any]]]:
        held, size = list[dict[str, Any]](), 0
        as_text = {name for name, feature in self.info.features.items() if isinstance(feature, JsonText)}
        for row in self._read():
            values = {name: row[name] for name in row.keys() & as_text if row[name] is not None}
            texts = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
            held.append({**row, **texts})
            size += sum(map(len, texts.values()))
            size += sum(len(image["bytes"]) for name in row.keys() - as_text for image in row[name])
            if len(held) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                yield held
                held, size = [], 0
        if held:
            yield held
