"""Where rows come from: files, folders, saved datasets or the hub, read lazily and never re-encoded."""

import bisect
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from datasets.features import Image, List

from tuning.errors import UserError

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Row:
    """One row as it is stored: images are not decoded. `where` names its file and 0-based number in it."""

    columns: Mapping[str, Any]
    where: str
    folder: Path | None


@dataclass(frozen=True)
class Part:
    """The rows of one file (or hub dataset), and the folder that relative image paths start from."""

    name: str
    rows: datasets.Dataset
    folder: Path | None


class Source:
    """The rows of one or more files behind one index, each remembering its file."""

    def __init__(self, parts: list[Part]):
        self.parts = parts
        self._ends = list(itertools.accumulate(len(part.rows) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        number = bisect.bisect_right(self._ends, index)
        part = self.parts[number]
        row = index - (self._ends[number - 1] if number else 0)
        return Row(part.rows[row], f"{part.name}, row {row}", part.folder)

    def identity(self) -> list[list]:
        """Name and number of rows of every part: what tells changed data from the same data."""
        return [[part.name, len(part.rows)] for part in self.parts]


def open_source(
    path: str,
    *,
    text_field: str,
    image_field: str,
    split: str | None = None,
    config_name: str | None = None,
) -> Source:
    """Open `path`: a .json/.jsonl/.parquet/.arrow file, a folder of them, a `save_to_disk` folder, or a hub id.

    JSON and parquet are converted to Arrow once, by `datasets`, and memory-mapped from then on. Raises `UserError`
    when there is nothing to read, a file is broken, or a column is missing.
    """
    local = Path(path).expanduser()
    if local.is_file():
        parts = [_open_file(local, path)]
    elif local.is_dir() and ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
        parts = [_open_saved(local, split)]
    elif local.is_dir():
        parts = [_open_file(file, str(file)) for file in _files_of_split(local, split or "train")]
    else:
        parts = [_open_hub(path, split or "train", config_name)]
    prepared = [_prepare(part, text_field, image_field) for part in parts]
    if not sum(len(part.rows) for part in prepared):
        raise UserError("has no rows.", where=path)
    return Source(prepared)


def _open_file(file: Path, name: str) -> Part:
    builder = BUILDERS.get(file.suffix)
    if builder is None:
        raise UserError(
            f"cannot read {file.suffix or 'this kind of'} files.", name, f"Use one of {', '.join(BUILDERS)}."
        )
    if not file.stat().st_size:
        raise UserError("the file is empty.", where=name)
    try:
        if builder == "arrow":
            rows = datasets.Dataset.from_file(str(file))
        else:
            rows = datasets.load_dataset(builder, data_files=[str(file)], split="train")
    except (DatasetGenerationError, datasets.exceptions.DatasetNotFoundError, ValueError, OSError) as error:
        raise _unreadable(file, name, error) from error
    return Part(name, rows, file.parent)


def _unreadable(file: Path, name: str, error: Exception) -> UserError:
    """Find the line that is to blame where there are lines."""
    if file.suffix == ".jsonl":
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(line for line in lines if line.strip()):
                try:
                    json.loads(line)
                except json.JSONDecodeError as fault:
                    return UserError(f"not valid JSON: {fault.msg} (column {fault.colno}).", f"{name}, row {number}")
    reason = error.__cause__ or error
    return UserError(f"cannot be read as {file.suffix[1:]}: {str(reason).splitlines()[0]}", where=name)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files below `folder`; where their names speak of splits, only those of `split`."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in BUILDERS and not file.name.startswith("."))
    named = {file: _split_in_name(file.relative_to(folder)) for file in files}
    if any(named.values()):
        chosen = [file for file in files if named[file] == split]
        if files and not chosen:
            found = ", ".join(sorted({word for word in named.values() if word}))
            raise UserError(f"has no split '{split}'; it has: {found}.", str(folder), "Set dataset_split.")
        files = chosen
    if not files:
        raise UserError(f"holds no {', '.join(BUILDERS)} file.", where=str(folder))
    return files


def _split_in_name(path: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((split for split, aliases in SPLIT_WORDS.items() if words & set(aliases)), None)


def _open_saved(folder: Path, split: str | None) -> Part:
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, IndexError) as error:  # IndexError: saved without a row
        raise UserError(f"cannot be read as a saved dataset: {error}.", where=str(folder)) from error
    return Part(str(folder), _pick_split(saved, str(folder), split or "train"), folder)


def _pick_split(loaded: datasets.Dataset | datasets.DatasetDict, name: str, split: str) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise UserError(f"has no split '{split}'; it has: {', '.join(loaded)}.", name, "Set dataset_split.")
    return loaded[split]


def _open_hub(name: str, split: str, config_name: str | None) -> Part:
    try:
        rows = datasets.load_dataset(name, config_name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"is neither a local file or folder nor a dataset that could be loaded: {reason}",
            where=name,
            fix="Check the name, dataset_config_name and dataset_split.",
        ) from error
    return Part(name, rows, None)


def _prepare(part: Part, text_field: str, image_field: str) -> Part:
    """Check the columns, and keep images as stored bytes or paths: they are decoded row by row in the workers."""
    columns = part.rows.column_names
    for option, field in (("dataset_text_field", text_field), ("dataset_image_field", image_field)):
        if field not in columns:
            raise UserError(f"has no column '{field}'; it has: {', '.join(columns)}.", part.name, f"Set {option}.")
    rows = part.rows.select_columns([text_field, image_field])
    feature = rows.features[image_field]
    if isinstance(feature, Image):
        rows = _relabel(rows, image_field, Image(decode=False))
    elif isinstance(feature, List) and isinstance(feature.feature, Image):
        rows = _relabel(rows, image_field, List(Image(decode=False)))
    return Part(part.name, rows, part.folder)


def _relabel(rows: datasets.Dataset, field: str, feature: Any) -> datasets.Dataset:
    """Read a column as `feature` of the same storage. `cast_column` would copy a column of lists to a new file."""
    info = rows.info.copy()
    info.features = datasets.Features({**rows.features, field: feature})
    return datasets.Dataset(rows.data.cast(info.features.arrow_schema), info=info, indices_table=rows._indices)
