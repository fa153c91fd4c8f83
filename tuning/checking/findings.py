"""Measure all rows of a dataset, and collect what is found."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from tuning.checking.estimates import Lengths
from tuning.checking.report import Problem
from tuning.data.row_lengths import CHUNK, Measured, RowMeter, measure_rows
from tuning.data.sources import DataFile, Row, Stream, read_file
from tuning.errors import UserError
from tuning.machine import count_cores

MAX_WORKERS = 16


@dataclass
class Findings:
    """What was found in the rows so far. It keeps plain numbers for good rows, to stay small."""

    files: list[DataFile]
    problems: list[Problem] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    image_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    ignored_keys: Counter[str] = field(default_factory=Counter)
    good_rows: list[np.ndarray] = field(default_factory=list)  # the columns of `Lengths`, a chunk of rows each
    problems_of_samples: set[tuple[str, int]] = field(default_factory=set)  # file and row

    def add(self, chunk: Iterable[Measured]) -> None:
        good = []
        for row in chunk:
            self.counts["rows"] += 1
            if row.error is not None:
                self.add_problem(row.error, self.files[row.file].name, row.number)
                continue
            self.image_sizes.update(row.image_sizes)
            self.ignored_keys.update(row.ignored_keys)
            self.counts.update(
                images=len(row.image_sizes),
                dropped_images=row.dropped_images,
                rows_left_out=row.left_out,
                rows_cut=row.cut,
                rows_with_control_tokens=row.has_special_tokens,
            )
            if row.left_out:
                self.left_out.append({"row": row.number, "file": self.files[row.file].name, "tokens": row.tokens})
            else:
                good.append((row.file, row.number, row.tokens, row.image_tokens, row.supervised_tokens))
        self.good_rows.append(np.array(good, dtype=np.int32).reshape(-1, 5))

    def add_problem(self, error: UserError, file: str, number: int) -> None:
        self.counts["bad_rows"] += 1
        self.problems.append(Problem(error.kind or "other", number, error.field, str(error), file))

    def map_good(self, action: Callable[[Row], Any], rows: Iterable[Row]) -> list[Any]:
        """The results of `action` on rows. A row for which it raises `UserError` becomes a problem, once."""
        results = []
        for row in rows:
            try:
                results.append(action(row))
            except UserError as error:
                if (row.file, row.number) not in self.problems_of_samples:
                    self.add_problem(error, row.file, row.number)
                self.problems_of_samples.add((row.file, row.number))
        return results

    def lengths(self) -> Lengths:
        return Lengths(*np.concatenate([np.empty((0, 5), np.int32), *self.good_rows]).T)


def measure_all(source: Any, meter: RowMeter, limit: int | None = None) -> Findings:
    """Measure every row, or the first `limit` rows, and show a progress bar."""
    findings = Findings(source.files)
    size = sum(file.size for file in source.files)  # 0 for a stream
    total = min(size, limit or size) if size else limit
    if isinstance(source, Stream):
        chunks = _measure_stream(source, meter, limit)
    else:
        few = total is not None and total <= 4 * CHUNK  # starting processes would take longer
        workers = 0 if few else min(count_cores(), MAX_WORKERS)
        chunks = measure_rows(source.files, meter, limit=limit, workers=workers)
    with tqdm(total=total, desc="checking rows", unit="row") as progress:
        for chunk in chunks:
            findings.add(chunk)
            progress.update(len(chunk))
    return findings


def _measure_stream(source: Stream, meter: RowMeter, limit: int | None) -> Iterable[list[Measured]]:
    numbered = ((number, row) for number, file in enumerate(source.files) for row in read_file(file))
    for number, row in itertools.islice(numbered, limit):
        if isinstance(row, UserError):
            raise row
        yield meter.measure([row], number)


def row_finder(source: Any, lengths: Lengths) -> Callable[[int], Row]:
    """A function from a position in `lengths` to its row."""

    def find(index: int) -> Row:
        file, number = source.files[lengths.file[index]], int(lengths.number[index])
        if isinstance(source, Stream):
            return file.row(number, next(iter(file.rows.skip(number))))
        return file.row(number, file.rows[number])

    return find
