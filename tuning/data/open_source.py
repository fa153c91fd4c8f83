"""Opens data: files, folders, saved datasets, or datasets of the hub. Images stay as they are stored."""

import glob
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from datasets.features import Array2D, Array3D, Array4D, Array5D, Image, List
from pyarrow import parquet
from pyarrow import schema as arrow_schema

from tuning.console import print0
from tuning.data.data_folder import WHOLE, find_splits, list_files, print_files
from tuning.data.fitting_columns import NO_TEXT_COLUMN
from tuning.data.formats import DEFAULT_IMAGE_FIELD, EXTRA_COLUMNS, RowFormat, detect_format, fit_format
from tuning.data.row_files import READERS, JsonText, open_converted, open_streamed, pick_columns
from tuning.data.sources import UNREADABLE, DataFile, Source, read_file, unreadable
from tuning.data.splits import SPLIT_OF_ALIAS, read_splits
from tuning.errors import UserError, first_line

SUFFIXES = (*READERS, ".parquet", ".arrow")
FIRST_ROWS, SPREAD = 16, 48  # the format is detected from the first rows, and from some of all over the data
FIRST_STREAMED_ROWS = 1000  # of files that we stream ourselves: as many as are shuffled
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
ARRAYS = (Array2D, Array3D, Array4D, Array5D)
FILE_NAMES = ("file_name", "file_names")  # the columns of images in a metadata file of an ImageFolder


def open_source(
    path: str,
    *,
    text_field: str,
    image_field: str,
    split: str | None = None,
    default_split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    more_fields: Sequence[str] = (),
    format: RowFormat | None = None,
    needs_image_field: bool = True,
    needs_answers: bool = True,
) -> Source:
    """Open `path`: a file with one of `SUFFIXES`, a folder of them, a `save_to_disk` folder, or a hub id.

    A file is converted to Arrow once and then mapped into memory. With `streaming` it is read as it is, and has no
    length. `split`: such as `validation` or `train[:50%]`. Without it, reads `default_split` where there are splits,
    and otherwise all rows. `more_fields`: columns to keep besides the conversation's. `format`: of the rows, instead
    of detecting it. `needs_image_field`: a column of images that the user named must be in one of the files. Without
    `needs_answers`, a prompt needs no completion. Raises
    `UserError` where there is nothing to read, a file is broken, or a column is missing.
    """
    local = Path(path).expanduser()
    if local.is_file():
        files = _open_single(local, path, split, streaming)
    elif local.is_dir() and ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
        files = _open_saved(local, split, default_split, streaming)
    elif local.is_dir():
        files = _open_folder(local, split, default_split, streaming)
    else:
        open_split = partial(_open_hub, path, config_name, streaming)
        files = read_splits(split or default_split, path, None, open_split)
    prepare = partial(_prepare, text_field, image_field, more_fields, format, path, needs_answers)
    prepared = _prepare_folder(files, prepare) if local.is_dir() else [prepare(file) for file in files]
    if all(next(read_file(file), None) is None for file in prepared):
        raise _no_rows(path)
    if needs_image_field and format is None:
        check_image_field(prepared, image_field)
    return Source(prepared)


def check_image_field(files: Sequence[DataFile], image_field: str) -> None:
    """Raise `UserError` where no file has the column of images that the user named."""
    if image_field != DEFAULT_IMAGE_FIELD and not any(file.format.image_field == image_field for file in files):
        names = ", ".join(dict.fromkeys(name for file in files for name in file.names))
        raise UserError(
            where=files[0].name,
            problem=f"there is no column '{image_field}', only: {names}.",
            fix="Set dataset_image_field.",
        )


def _open_single(file: Path, name: str, split: str | None, streaming: bool) -> list[DataFile]:
    """A file, which is the split train, and also the split that its name says."""
    opened = [_open_file(file, name, streaming)]
    if split is None:
        return opened
    named = [
        word for word in file.name.lower().replace("-", "_").replace(".", "_").split("_") if word in SPLIT_OF_ALIAS
    ]
    known = list(dict.fromkeys(["train", *(SPLIT_OF_ALIAS[word] for word in named)]))
    return read_splits(split, name, known, lambda _: opened)


def _open_folder(folder: Path, split: str | None, default_split: str, streaming: bool) -> list[DataFile]:
    present, read = list_files(folder), list[Path]()
    splits = find_splits(folder, present, SUFFIXES)
    if WHOLE in splits:
        splits, default_split = {"train": splits[WHOLE]}, "train"

    def open_split(name: str) -> list[DataFile]:
        read.extend(splits[name])
        return [_open_file(file, str(file), streaming) for file in splits[name]]

    files = read_splits(split or default_split, str(folder), list(splits), open_split)
    print_files(folder, present, read)
    return files


def _open_file(file: Path, name: str, streaming: bool) -> DataFile:
    suffix = next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise UserError(
            where=name,
            problem=f"{file.suffix or 'this kind of'} files cannot be read.",
            fix=f"Use one of {', '.join(SUFFIXES)}.",
        )
    if not file.stat().st_size:
        raise UserError(where=name, problem="the file is empty.", fix="Give a file with rows.")
    try:
        if suffix in READERS:
            rows = (open_streamed if streaming else open_converted)(file, READERS[suffix])
        elif suffix == ".arrow":
            rows = datasets.Dataset.from_file(str(file))
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            rows = _open_parquet(file, streaming)
    except (DatasetsError, ValueError, OSError, EOFError, zlib.error) as error:
        raise _unreadable_file(suffix, name, error) from error
    return DataFile(name, rows, file.parent)


def _open_parquet(file: Path, streaming: bool) -> Any:
    if "::" in str(file):
        raise UserError(where=str(file), problem="`datasets` cannot read a path with '::'.", fix="Rename it.")
    pattern = glob.escape(str(file))  # `datasets` takes every path for a pattern
    load = partial(datasets.load_dataset, "parquet", data_files=[pattern], split="train", streaming=streaming)
    strange = _strange_columns(file)
    if not strange:
        return load()
    listed = ", ".join(f"'{name}' ({kind})" for name, kind in strange.items())
    print0(f"{file}: `datasets` has no type for these columns, which are left out: {listed}.")
    columns = [name for name in parquet.read_schema(file).names if name not in strange]
    schema = arrow_schema([field for field in parquet.read_schema(file) if field.name in columns])
    return load(columns=columns, features=datasets.Features.from_arrow_schema(schema))


def _strange_columns(file: Path) -> dict[str, str]:
    """The columns that `datasets` has no type for, such as maps, and their types."""
    strange = {}
    for field in parquet.read_schema(file):
        try:
            datasets.Features.from_arrow_schema(arrow_schema([field]))
        except ValueError:
            strange[field.name] = str(field.type)
    return strange


def _no_rows(name: str) -> UserError:
    return UserError(where=name, problem="there are no rows.", fix="Give data with at least one row.")


def _unreadable_file(suffix: str, name: str, error: Exception) -> UserError:
    """The error of a file that cannot be opened."""
    cause = error.__cause__ or error
    if isinstance(cause, UserError):  # of a reader of ours, which names the row
        return cause
    if "corresponds to no data" in str(error):
        return _no_rows(name)
    return UserError(
        where=name, problem=f"the file cannot be read as {suffix[1:]}: {first_line(cause)}.", fix="Repair the file."
    )


def _open_saved(folder: Path, split: str | None, default_split: str, streaming: bool) -> list[DataFile]:
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, IndexError) as error:  # IndexError: saved without a row
        raise UserError(
            where=str(folder),
            problem=f"the folder cannot be read as a saved dataset: {error}.",
            fix="Save the dataset again, with at least one row.",
        ) from error
    is_split = isinstance(saved, datasets.DatasetDict)

    def open_split(name: str) -> list[DataFile]:
        rows = saved[name] if is_split else saved
        rows = rows.to_iterable_dataset() if streaming else rows
        return [DataFile(str(folder), rows, folder, split=name if is_split else "")]

    if split is None and not is_split:
        return open_split("train")
    return read_splits(split or default_split, str(folder), list(saved) if is_split else ["train"], open_split)


def _open_hub(name: str, config_name: str | None, streaming: bool, split: str) -> list[DataFile]:
    try:
        rows = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            where=name,
            problem=f"there is no such file or folder, and the hub dataset could not be loaded: {first_line(error)}.",
            fix="Check the name, dataset_config_name and dataset_split.",
        ) from error
    folder = Path(datasets.config.HF_CACHE_HOME)  # of downloaded image files
    return [DataFile(name, rows, folder, split=split)]


def _prepare_folder(files: Sequence[DataFile], prepare: Callable[[DataFile], DataFile]) -> list[DataFile]:
    """The files of a folder, without the tables that have other contents than the files beside them."""
    prepared, errors = [], list[UserError]()
    for file in files:
        try:
            prepared.append(prepare(file))
        except UserError as error:
            if error.kind != NO_TEXT_COLUMN or not file.name.lower().endswith(TABLES):
                raise
            errors.append(error)
    if errors and not prepared:
        raise errors[0]
    for left_out in errors:
        print0(f"Left out, because it has no messages: {left_out.where}.")
    return prepared


def _prepare(
    text_field: str,
    image_field: str,
    more_fields: Sequence[str],
    format: RowFormat | None,
    path: str,
    needs_answers: bool,
    file: DataFile,
) -> DataFile:
    """Detect the format of the rows, and keep images as stored: they are decoded later, one by one.

    `path`: what the user gave, for errors.
    """
    file = replace(file, rows=_undecoded(file.rows))
    names, first = _read_first(file)
    more_images = FILE_NAMES if Path(file.name).name.lower().startswith("metadata.") else ()
    if format is None:
        found = detect_format(
            *(names, first),
            text_field=text_field,
            image_field=image_field,
            where=file.name,
            path=path,
            more_images=more_images,
            needs_answers=needs_answers,
        )
    else:
        found = fit_format(format, names, first, where=file.name, more_images=more_images)
    if missing := [name for name in more_fields if name not in names]:
        raise UserError(
            where=file.name,
            problem=f"there is no column '{missing[0]}', only: {', '.join(names)}.",
            fix="Give another column.",
        )
    if _is_streamed_by_us(file.rows):
        if found.image_field is None and format is None:  # the column may come later than the first rows
            found = replace(found, image_field=image_field)
        extras = tuple(name for name in EXTRA_COLUMNS if name in found.extra_columns or name not in found.columns)
        found = replace(found, extra_columns=extras)  # so may these
    is_ours = _is_streamed_by_us(file.rows) or isinstance(
        (file.rows.features or {}).get(found.text_fields[0]), JsonText
    )
    found = replace(found, keep_nulls=is_ours)  # our readers add none
    columns = list(dict.fromkeys([*found.columns, *more_fields]))
    unused = {name: _count_values(file.rows, name) for name in names if name not in columns}
    file = replace(file, format=found, names=names, unused=unused)
    if _is_streamed_by_us(file.rows):
        needed = [name for name in columns if name not in found.extra_columns]
        instead = {} if {DEFAULT_IMAGE_FIELD, "image"} <= set(names) else {DEFAULT_IMAGE_FIELD: "image"}
        rows = pick_columns(file.rows, needed, instead, found.extra_columns)
        return replace(file, rows=rows)
    rows = file.rows.select_columns(columns)
    if found.image_field and isinstance((rows.features or {}).get(found.image_field), ARRAYS):
        raise UserError(
            where=file.name,
            problem=f"the column '{found.image_field}' has arrays of numbers.",
            fix="Save it as the Image feature of `datasets`, or as encoded bytes.",
        )
    return replace(file, rows=rows)


def _count_values(rows: Any, name: str) -> int:
    """The number of rows that have a value in a column, or 0 where rows are streamed."""
    if isinstance(rows, datasets.IterableDataset):
        return 0
    return len(rows) - rows.data.column(name).null_count


def _is_streamed_by_us(rows: Any) -> bool:
    return isinstance(rows, datasets.IterableDataset) and rows.features is None


def _read_first(file: DataFile) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of the columns, and a few rows with all of them."""
    rows = file.rows
    count = FIRST_STREAMED_ROWS if _is_streamed_by_us(rows) else FIRST_ROWS
    try:
        if isinstance(rows, datasets.IterableDataset):
            first = list(rows.take(count))
            names = list(dict.fromkeys(name for row in first for name in row))
        else:
            first = [file.read(place).columns for place in _choose_rows(file.size)]
            names = list(rows.column_names or [])
    except UNREADABLE as error:
        raise unreadable(file.name, error) from error
    if not names:
        raise _no_rows(file.name)
    return names, [{name: row.get(name) for name in names} for row in first]


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
