"""Opens data: files, folders, saved datasets, or datasets of the hub. Images stay as they are stored."""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from datasets.features import Image, Json, List

from tuning.data.formats import detect_format
from tuning.data.sources import UNREADABLE, DataFile, Source, read_file, unreadable
from tuning.errors import UserError, first_line

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
FIRST_ROWS, SPREAD = 16, 48  # the format is detected from the first rows, and from some of all over the data
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


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

    `datasets` converts JSON and parquet to Arrow once and then maps the file into memory. With `streaming` it reads
    them as they are, and the files have no length. `more_fields`: columns to keep besides the conversation's. Raises
    `UserError` where there is nothing to read, a file is broken, or a column is missing.
    """
    local = Path(path).expanduser()
    if local.is_file():
        files = [_open_file(local, path, streaming)]
    elif local.is_dir() and ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
        files = [_open_saved(local, split, streaming)]
    elif local.is_dir():
        files = [_open_file(file, str(file), streaming) for file in _files_of_split(local, split or "train")]
    else:
        files = [_open_hub(path, split or "train", config_name, streaming)]
    prepared = [_prepare(file, text_field, image_field, more_fields) for file in files]
    if all(next(read_file(file), None) is None for file in prepared):
        raise _no_rows(path)
    return Source(prepared)


def _open_file(file: Path, name: str, streaming: bool) -> DataFile:
    builder = BUILDERS.get(file.suffix)
    if builder is None:
        raise UserError(
            where=name,
            problem=f"{file.suffix or 'this kind of'} files cannot be read.",
            fix=f"Use one of {', '.join(BUILDERS)}.",
        )
    if not file.stat().st_size:
        raise UserError(where=name, problem="the file is empty.", fix="Give a file with rows.")
    try:
        if builder == "arrow":
            rows = datasets.Dataset.from_file(str(file))
            rows = rows.to_iterable_dataset() if streaming else rows
        elif builder == "json" and not streaming:
            rows = _load_json(file)
        else:
            rows = datasets.load_dataset(builder, data_files=[str(file)], split="train", streaming=streaming)
    except (DatasetsError, ValueError, OSError) as error:
        raise _unreadable_file(file, name, error) from error
    return DataFile(name, rows, file.parent)


def _load_json(file: Path) -> datasets.Dataset:
    """The rows of a JSON file, with the types that `datasets` finds in its first 10 MB.

    Columns keep their JSON where later rows have other types, or where text was read as dates.
    """
    load = functools.partial(datasets.load_dataset, "json", data_files=[str(file)], split="train")
    try:
        rows = load()
    except datasets.exceptions.DatasetGenerationError:
        names = _names_in_json(file)
        if not names:
            raise
        return load(features=datasets.Features({name: Json() for name in names}))
    dated = [name for name, feature in rows.features.items() if "Value('timestamp" in repr(feature)]
    return load(features=datasets.Features({**rows.features, **{name: Json() for name in dated}})) if dated else rows


def _names_in_json(file: Path) -> list[str]:
    """The keys of all rows, or none where a row is not an object. Raises `ValueError` where the file is not JSON."""
    with open(file, encoding="utf-8-sig") as text:
        rows = map(json.loads, filter(str.strip, text)) if file.suffix == ".jsonl" else json.load(text)
        names: dict[str, None] = {}
        for row in rows:
            if not isinstance(row, dict):
                return []
            names.update(dict.fromkeys(row))
    return list(names)


def _no_rows(name: str) -> UserError:
    return UserError(where=name, problem="there are no rows.", fix="Give data with at least one row.")


def _unreadable_file(file: Path, name: str, error: Exception) -> UserError:
    """The error of a file that `datasets` cannot open. In a file of JSON lines, names the first bad line."""
    if "corresponds to no data" in str(error):
        return _no_rows(name)
    if file.suffix == ".jsonl":
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(line for line in lines if line.strip()):
                try:
                    json.loads(line)
                except json.JSONDecodeError as fault:
                    return UserError(
                        where=f"{name}, row {number}",
                        problem=f"the line is not valid JSON: {fault.msg} (column {fault.colno}).",
                        fix="Repair the line.",
                    )
    reason = first_line(error.__cause__ or error)
    return UserError(
        where=name, problem=f"the file cannot be read as {file.suffix[1:]}: {reason}.", fix="Repair the file."
    )


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files below `folder`. Where file names contain splits, only those of `split`."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in BUILDERS and not file.name.startswith("."))
    named = {file: _split_in_name(file.relative_to(folder)) for file in files}
    if any(named.values()):
        chosen = [file for file in files if named[file] == split]
        if files and not chosen:
            found = ", ".join(sorted({word for word in named.values() if word}))
            raise _no_split(str(folder), split, found)
        files = chosen
    if not files:
        raise UserError(
            where=str(folder), problem=f"the folder has no {', '.join(BUILDERS)} file.", fix="Give another folder."
        )
    return files


def _no_split(name: str, split: str, found: str) -> UserError:
    return UserError(where=name, problem=f"there is no split '{split}', only: {found}.", fix="Set dataset_split.")


def _split_in_name(path: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((split for split, aliases in SPLIT_WORDS.items() if words & set(aliases)), None)


def _open_saved(folder: Path, split: str | None, streaming: bool) -> DataFile:
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, IndexError) as error:  # IndexError: saved without a row
        raise UserError(
            where=str(folder),
            problem=f"the folder cannot be read as a saved dataset: {error}.",
            fix="Save the dataset again, with at least one row.",
        ) from error
    rows = _pick_split(saved, str(folder), split or "train")
    return DataFile(str(folder), rows.to_iterable_dataset() if streaming else rows, folder)


def _pick_split(loaded: datasets.Dataset | datasets.DatasetDict, name: str, split: str) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise _no_split(name, split, ", ".join(loaded))
    return loaded[split]


def _open_hub(name: str, split: str, config_name: str | None, streaming: bool) -> DataFile:
    try:
        rows = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            where=name,
            problem=f"there is no such file or folder, and the hub dataset could not be loaded: {first_line(error)}.",
            fix="Check the name, dataset_config_name and dataset_split.",
        ) from error
    return DataFile(name, rows, Path(datasets.config.HF_CACHE_HOME))  # the folder of downloaded image files


def _prepare(file: DataFile, text_field: str, image_field: str, more_fields: Sequence[str]) -> DataFile:
    """Detect the format of the rows, and keep images as stored: they are decoded later, one by one."""
    streaming = isinstance(file.rows, datasets.IterableDataset)
    rows = _undecoded(file.rows)
    try:
        first = list(rows.take(FIRST_ROWS)) if streaming else list(rows.select(_choose_rows(len(rows))))
    except UNREADABLE as error:
        raise unreadable(file.name, error) from error
    names = list(first[0]) if streaming and first else rows.column_names or []
    if not names:
        raise _no_rows(file.name)
    format = detect_format(names, first, text_field=text_field, image_field=image_field, where=file.name)
    if missing := [name for name in more_fields if name not in names]:
        raise UserError(
            where=file.name,
            problem=f"there is no column '{missing[0]}', only: {', '.join(names)}.",
            fix="Give another column.",
        )
    columns = list(dict.fromkeys([*format.columns, *more_fields]))
    unused = {name: _count_values(rows, name) for name in names if name not in columns}
    return DataFile(file.name, rows.select_columns(columns), file.folder, format, unused)


def _count_values(rows: Any, name: str) -> int:
    """The number of rows that have a value in a column, or 0 where rows are streamed."""
    if isinstance(rows, datasets.IterableDataset):
        return 0
    return len(rows) - rows.data.column(name).null_count


def _choose_rows(count: int) -> list[int]:
    spread = range(FIRST_ROWS, count, max(1, (count - FIRST_ROWS) // SPREAD))
    return [*range(min(FIRST_ROWS, count)), *spread]


def _undecoded(rows: Any) -> Any:
    for name, feature in (rows.features or {}).items():
        plain = _undecoded_feature(feature)
        if plain != feature:
            streaming = isinstance(rows, datasets.IterableDataset)
            rows = rows.cast_column(name, plain) if streaming else _relabel(rows, name, plain)
    return rows


def _undecoded_feature(feature: Any) -> Any:
    """The same feature, with every `Image` in it, at any depth, left as stored."""
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
