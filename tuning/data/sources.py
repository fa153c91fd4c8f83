"""The rows of one or more data files: behind one index, mixed by weight, or streamed."""

import bisect
import itertools
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow

from tuning.data.formats import RowFormat
from tuning.data.row_files import read_streamed
from tuning.errors import UserError, first_line

# What `datasets` raises for files that it cannot read. It checks no row before it is read.
UNREADABLE = (
    *(pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError, TypeError),
    *(EOFError, zlib.error),  # of files that are compressed
)


@dataclass(frozen=True)
class Row:
    """One row as it is stored: images are not decoded. `number` is its place in `file`, from 0."""

    columns: Mapping[str, Any]
    file: str
    number: int
    folder: Path | None = None
    format: RowFormat = RowFormat()

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True)
class DataFile:
    """The rows of one file (or hub dataset), the folder that relative image paths start from, and their format.

    `numbers`: the numbers of those rows that belong to the data, in rising order, where it is not all of them. `split`:
    the split that the rows come from, where a saved or hub dataset has several under one name. `origin`: the name
    without the split, where `name` has it. `names`: all columns of
    the file, of which `rows` has those that are used. `unused`: the others, and how many rows have them (0: not known).
    """

    name: str
    rows: Any  # datasets.Dataset, or IterableDataset where rows are streamed
    folder: Path | None
    format: RowFormat = RowFormat()
    numbers: Sequence[int] | np.ndarray | None = None
    split: str = ""
    origin: str = ""
    names: Sequence[str] = ()
    unused: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of rows, or 0 where it is not known because they are streamed."""
        if self.numbers is not None:
            return len(self.numbers)
        return len(self.rows) if isinstance(self.rows, datasets.Dataset) else 0

    def row(self, number: int, columns: Mapping[str, Any]) -> Row:
        """The row `number` with these columns."""
        return Row(columns, self.name, number, self.folder, self.format)

    def read(self, place: int) -> Row:
        """The row at `place` among those that belong to the data."""
        number = place if self.numbers is None else int(self.numbers[place])
        return self.row(number, self.rows[number])

    def read_many(self, places: Sequence[int]) -> list[Row]:
        """The rows at these places. `datasets` reads columns several times as fast as single rows."""
        numbers = places if self.numbers is None else np.asarray(self.numbers)[list(places)].tolist()
        columns = self.rows[numbers]
        return [
            self.row(number, {name: values[place] for name, values in columns.items()})
            for place, number in enumerate(numbers)
        ]

    def keep(self, places: Sequence[int] | np.ndarray) -> "DataFile":
        """The same file with only the rows at these places, which rise."""
        numbers = places if self.numbers is None else np.asarray(self.numbers)[np.asarray(places, dtype=np.int64)]
        return replace(self, numbers=numbers)


class Source:
    """The rows of one or more files behind one index."""

    def __init__(self, files: list[DataFile]):
        self.files = files
        self._ends = list(itertools.accumulate(file.size for file in files))

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the file that has this row, and the row's place among the rows that we read of it."""
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def __getitem__(self, index: int) -> Row:
        number, place = self.locate(index)
        return self.files[number].read(place)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def fingerprint(self) -> list[list]:
        """Name and number of rows of every file, to see whether the data has changed."""
        return [[file.name, file.size] for file in self.files]


class Mixture:
    """Several sources behind one index, mixed by weight.

    An epoch has every row at least once: the source that is largest for its weight is read once, and the others are
    repeated from their start.
    """

    def __init__(self, sources: list[Source], weights: list[float]):
        self.sources, self.weights = sources, weights
        passes = max(len(source) / weight for source, weight in zip(sources, weights, strict=True))
        self.draws = [max(1, round(weight * passes)) for weight in weights]
        self._ends = list(itertools.accumulate(self.draws))

    @property
    def files(self) -> list[DataFile]:
        return [file for source in self.sources for file in source.files]

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """As `Source.locate`, in the files of all sources."""
        number = bisect.bisect_right(self._ends, index)
        source, before = self.sources[number], sum(len(source.files) for source in self.sources[:number])
        file, row = source.locate((index - (self._ends[number - 1] if number else 0)) % len(source))
        return before + file, row

    def __getitem__(self, index: int) -> Row:
        number, place = self.locate(index)
        return self.files[number].read(place)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def fingerprint(self) -> list[list]:
        """As `Source.fingerprint`."""
        return [entry for source in self.sources for entry in source.fingerprint()]


@dataclass(frozen=True)
class Stream:
    """Rows that are read one after the other. Their number is not known. `weights`: of the files, or None."""

    files: list[DataFile]
    weights: list[float] | None = None

    def __iter__(self) -> Iterator[Row | UserError]:
        return itertools.chain.from_iterable(map(read_file, self.files))

    def one_epoch(self, choose: random.Random) -> Iterator[Row | UserError]:
        """All rows in order, or drawn by weight until every file has been read to its end."""
        if self.weights is None:
            yield from self
            return
        readers = [read_file(file) for file in self.files]
        unfinished = set(range(len(readers)))
        while unfinished:
            number = choose.choices(range(len(readers)), self.weights)[0]
            row = next(readers[number], None)
            if row is None:
                unfinished.discard(number)
                readers[number] = read_file(self.files[number])
                continue
            yield row

    def fingerprint(self) -> list[list]:
        """The name of every file."""
        return [[file.name] for file in self.files]


def read_file(file: DataFile) -> Iterator[Row | UserError]:
    """The rows of a file, in order. Where the next row cannot be read, its error comes last."""
    rows = _read_rows(file)
    while True:
        try:
            row = next(rows, None)
        except UserError as error:  # of a reader of ours, which names the row
            yield error
            return
        except UNREADABLE as error:
            yield unreadable(file.name, error)
            return
        if row is None:
            return
        yield row


def unreadable(file: str, error: Exception) -> UserError:
    """The error of a file that cannot be read because of one of `UNREADABLE`."""
    return UserError(
        where=file,
        problem=f"the file cannot be read: {first_line(error)}.",
        fix="Repair the file.",
        kind="unreadable",
    )


def _read_rows(file: DataFile) -> Iterator[Row]:
    if isinstance(file.rows, datasets.IterableDataset):
        return (file.row(number, columns) for number, columns in enumerate(read_streamed(file.rows)))
    if file.numbers is None:  # `datasets` iterates several times as fast as it reads by number
        return (file.row(number, columns) for number, columns in enumerate(file.rows))
    return map(file.read, range(file.size))
