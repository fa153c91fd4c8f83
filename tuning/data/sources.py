"""Where rows come from: files, folders, saved datasets or the hub, read lazily and never re-encoded."""

import bisect
import functools
import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetGenerationError
from datasets.features import Image, Json, List

from tuning.data.formats import RowFormat, detect_format
from tuning.errors import UserError

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
LOOKED_AT, SPREAD = 16, 48  # rows from which the form is read: the first, and some from all over the data
UNREADABLE = (
    pyarrow.ArrowException,
    DatasetGenerationError,
    datasets.exceptions.DatasetsError,
    OSError,
    ValueError,
    TypeError,
)
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Row:
    """One row as it is stored: images are not decoded. `where` names its file and its 0-based `number` in it."""

    columns: Mapping[str, Any]
    file: str
    number: int
    folder: Path | None = None
    format: RowFormat = RowFormat()

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True)
class Part:
    """The rows of one file (or hub dataset), the folder that relative image paths start from, and their form."""

    name: str
    rows: Any  # datasets.Dataset, or IterableDataset where rows are streamed
    folder: Path | None
    format: RowFormat = RowFormat()

    @property
    def size(self) -> int:
        """The number of rows; 0 where they are streamed and it is not known."""
        return len(self.rows) if isinstance(self.rows, datasets.Dataset) else 0

    def row(self, number: int, columns: Mapping[str, Any]) -> Row:
        return Row(columns, self.name, number, self.folder, self.format)


class Source:
    """The rows of one or more files behind one index, each remembering its file."""

    def __init__(self, parts: list[Part]):
        self.parts = parts
        self._ends = list(itertools.accumulate(part.size for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, index: int) -> tuple[int, int]:
        """The number of the part that has this row, and the row's number in it."""
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def __getitem__(self, index: int) -> Row:
        number, row = self.place(index)
        return self.parts[number].row(row, self.parts[number].rows[row])

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def fingerprint(self) -> list[list]:
        """Name and number of rows of every part: what tells changed data from the same data."""
        return [[part.name, len(part.rows)] for part in self.parts]


class Mixture:
    """Several sources behind one index, drawn from by weight.

    An epoch is as long as it takes to see every row once at these proportions: the source that is largest for its
    weight is passed once, and the others are repeated from their start.
    """

    def __init__(self, sources: list[Source], weights: list[float]):
        self.sources, self.weights = sources, weights
        passes = max(len(source) / weight for source, weight in zip(sources, weights, strict=True))
        self.draws = [max(1, round(weight * passes)) for weight in weights]
        self._ends = list(itertools.accumulate(self.draws))

    @property
    def parts(self) -> list[Part]:
        return [part for source in self.sources for part in source.parts]

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, index: int) -> tuple[int, int]:
        """As `Source.place`, in the parts of all sources."""
        number = bisect.bisect_right(self._ends, index)
        source, before = self.sources[number], sum(len(source.parts) for source in self.sources[:number])
        part, row = source.place((index - (self._ends[number - 1] if number else 0)) % len(source))
        return before + part, row

    def __getitem__(self, index: int) -> Row:
        number, row = self.place(index)
        return self.parts[number].row(row, self.parts[number].rows[row])

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def fingerprint(self) -> list[list]:
        return [entry for source in self.sources for entry in source.fingerprint()]


@dataclass(frozen=True)
class Stream:
    """Rows that are read one after the other; their number is not known. `weights`: of the parts, or None."""

    parts: list[Part]
    weights: list[float] | None = None

    def __iter__(self) -> Iterator[Row | UserError]:
        return itertools.chain.from_iterable(map(read_part, self.parts))

    def one_epoch(self, choose: random.Random) -> Iterator[Row | UserError]:
        """All rows in order, or drawn by weight until each part has been read to its end once."""
        if self.weights is None:
            yield from self
            return
        readers = [read_part(part) for part in self.parts]
        unfinished = set(range(len(readers)))
        while unfinished:
            number = choose.choices(range(len(readers)), self.weights)[0]
            row = next(readers[number], None)
            if row is None:
                unfinished.discard(number)
                readers[number] = read_part(self.parts[number])
                continue
            yield row

    def fingerprint(self) -> list[list]:
        return [[part.name] for part in self.parts]


def read_part(part: Part) -> Iterator[Row | UserError]:
    """The rows of a part, in order. What cannot be read any further is an error in the place of the next row."""
    rows = _read_rows(part)
    while True:
        try:
            row = next(rows, None)
        except UNREADABLE as error:
            yield UserError(
                where=part.name,
                problem=f"cannot be read: {str(error).splitlines()[0]}",
                fix="Mend the file.",
                kind="unreadable",
            )
            return
        if row is None:
            return
        yield row


def _read_rows(part: Part) -> Iterator[Row]:
    if isinstance(part.rows, datasets.IterableDataset):
        # By rows it would give each worker process of a DataLoader other files only, and most of them none.
        batches = part.rows.iter(batch_size=1)
        rows = ({name: values[0] for name, values in batch.items()} for batch in batches)
    else:
        rows = part.rows
    return (part.row(number, columns) for number, columns in enumerate(rows))


def open_source(
    path: str,
    *,
    text_field: str,
    image_field: str,
    split: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    more_fields: Sequence[str] = (),
) -> Source:
    """Open `path`: a .json/.jsonl/.parquet/.arrow file, a folder of them, a `save_to_disk` folder, or a hub id.

    JSON and parquet are converted to Arrow once, by `datasets`, and memory-mapped from then on; with `streaming` they
    are read as they are, and the parts have no length. `more_fields`: columns to keep beside the conversation's.
    Raises `UserError` when there is nothing to read, a file is broken, or a column is missing.
    """
    local = Path(path).expanduser()
    if local.is_file():
        parts = [_open_file(local, path, streaming)]
    elif local.is_dir() and ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
        parts = [_open_saved(local, split, streaming)]
    elif local.is_dir():
        parts = [_open_file(file, str(file), streaming) for file in _files_of_split(local, split or "train")]
    else:
        parts = [_open_hub(path, split or "train", config_name, streaming)]
    prepared = [_prepare(part, text_field, image_field, more_fields) for part in parts]
    if all(next(read_part(part), None) is None for part in prepared):
        raise UserError(where=path, problem="has no rows.")
    return Source(prepared)


def _open_file(file: Path, name: str, streaming: bool) -> Part:
    builder = BUILDERS.get(file.suffix)
    if builder is None:
        raise UserError(
            where=name,
            problem=f"cannot read {file.suffix or 'this kind of'} files.",
            fix=f"Use one of {', '.join(BUILDERS)}.",
        )
    if not file.stat().st_size:
        raise UserError(where=name, problem="the file is empty.")
    try:
        if builder == "arrow":
            rows = datasets.Dataset.from_file(str(file))
            rows = rows.to_iterable_dataset() if streaming else rows
        elif builder == "json" and not streaming:
            rows = _load_json(file)
        else:
            rows = datasets.load_dataset(builder, data_files=[str(file)], split="train", streaming=streaming)
    except (DatasetGenerationError, datasets.exceptions.DatasetNotFoundError, ValueError, OSError) as error:
        raise _unreadable(file, name, error) from error
    return Part(name, rows, file.parent)


def _load_json(file: Path) -> datasets.Dataset:
    """JSON, in the types of its first 10 MB; as it is where later rows differ or text was taken for dates."""
    load = functools.partial(datasets.load_dataset, "json", data_files=[str(file)], split="train")
    try:
        rows = load()
    except DatasetGenerationError:
        names = _names_in_json(file)
        if not names:
            raise
        return load(features=datasets.Features({name: Json() for name in names}))
    dated = [name for name, feature in rows.features.items() if "Value('timestamp" in repr(feature)]
    return load(features=datasets.Features({**rows.features, **{name: Json() for name in dated}})) if dated else rows


def _names_in_json(file: Path) -> list[str]:
    """The keys of all rows; none where a row is no object. Raises `ValueError` where it is not JSON."""
    with open(file, encoding="utf-8-sig") as text:
        rows = map(json.loads, filter(str.strip, text)) if file.suffix == ".jsonl" else json.load(text)
        names: dict[str, None] = {}
        for row in rows:
            if not isinstance(row, dict):
                return []
            names.update(dict.fromkeys(row))
    return list(names)


def _unreadable(file: Path, name: str, error: Exception) -> UserError:
    """Find the line that is to blame where there are lines."""
    if "corresponds to no data" in str(error):
        return UserError(where=name, problem="has no rows.")
    if file.suffix == ".jsonl":
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(line for line in lines if line.strip()):
                try:
                    json.loads(line)
                except json.JSONDecodeError as fault:
                    return UserError(
                        where=f"{name}, row {number}", problem=f"not valid JSON: {fault.msg} (column {fault.colno})."
                    )
    reason = error.__cause__ or error
    return UserError(where=name, problem=f"cannot be read as {file.suffix[1:]}: {str(reason).splitlines()[0]}")


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files below `folder`; where their names speak of splits, only those of `split`."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in BUILDERS and not file.name.startswith("."))
    named = {file: _split_in_name(file.relative_to(folder)) for file in files}
    if any(named.values()):
        chosen = [file for file in files if named[file] == split]
        if files and not chosen:
            found = ", ".join(sorted({word for word in named.values() if word}))
            raise UserError(
                where=str(folder), problem=f"has no split '{split}'; it has: {found}.", fix="Set dataset_split."
            )
        files = chosen
    if not files:
        raise UserError(where=str(folder), problem=f"holds no {', '.join(BUILDERS)} file.")
    return files


def _split_in_name(path: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((split for split, aliases in SPLIT_WORDS.items() if words & set(aliases)), None)


def _open_saved(folder: Path, split: str | None, streaming: bool) -> Part:
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, IndexError) as error:  # IndexError: saved without a row
        raise UserError(where=str(folder), problem=f"cannot be read as a saved dataset: {error}.") from error
    rows = _pick_split(saved, str(folder), split or "train")
    return Part(str(folder), rows.to_iterable_dataset() if streaming else rows, folder)


def _pick_split(loaded: datasets.Dataset | datasets.DatasetDict, name: str, split: str) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise UserError(
            where=name, problem=f"has no split '{split}'; it has: {', '.join(loaded)}.", fix="Set dataset_split."
        )
    return loaded[split]


def _open_hub(name: str, split: str, config_name: str | None, streaming: bool) -> Part:
    try:
        rows = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            where=name,
            problem=f"is neither a local file or folder nor a dataset that could be loaded: {reason}",
            fix="Check the name, dataset_config_name and dataset_split.",
        ) from error
    return Part(name, rows, Path(datasets.config.HF_CACHE_HOME))  # where downloaded image files lie


def _prepare(part: Part, text_field: str, image_field: str, more_fields: Sequence[str]) -> Part:
    """Find the form of the rows, and keep images as stored bytes or paths: they are decoded one by one, later."""
    streaming = isinstance(part.rows, datasets.IterableDataset)
    rows = _undecoded(part.rows)
    try:
        first = list(rows.take(LOOKED_AT)) if streaming else list(rows.select(_choose_rows(len(rows))))
    except UNREADABLE as error:
        raise UserError(
            where=part.name, problem=f"cannot be read: {str(error).splitlines()[0]}", fix="Mend the file."
        ) from error
    names = list(first[0]) if streaming and first else rows.column_names or []
    if not names:
        raise UserError(where=part.name, problem="has no rows.")
    format = detect_format(names, first, text_field=text_field, image_field=image_field, where=part.name)
    if missing := [name for name in more_fields if name not in names]:
        raise UserError(where=part.name, problem=f"has no column '{missing[0]}'; it has: {', '.join(names)}.")
    columns = list(dict.fromkeys([*format.columns, *more_fields]))
    return Part(part.name, rows.select_columns(columns), part.folder, format)


def _choose_rows(count: int) -> list[int]:
    spread = range(LOOKED_AT, count, max(1, (count - LOOKED_AT) // SPREAD))
    return [*range(min(LOOKED_AT, count)), *spread]


def _undecoded(rows: Any) -> Any:
    for name, feature in (rows.features or {}).items():
        plain = _undecoded_feature(feature)
        if plain != feature:
            streaming = isinstance(rows, datasets.IterableDataset)
            rows = rows.cast_column(name, plain) if streaming else _relabel(rows, name, plain)
    return rows


def _undecoded_feature(feature: Any) -> Any:
    """The same feature with every `Image` in it, at any depth, left as stored."""
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_undecoded_feature(feature.feature), length=feature.length)
    if isinstance(feature, dict):
        return {name: _undecoded_feature(inner) for name, inner in feature.items()}
    return feature


def _relabel(rows: datasets.Dataset, field: str, feature: Any) -> datasets.Dataset:
    """Read a column as `feature` of the same storage. `cast_column` would copy a column of lists to a new file."""
    info = rows.info.copy()
    info.features = datasets.Features({**rows.features, field: feature})
    return datasets.Dataset(rows.data.cast(info.features.arrow_schema), info=info, indices_table=rows._indices)
