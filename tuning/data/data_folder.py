"""Which files of a folder are data, and of which split."""

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tuning.console import print0
from tuning.data.splits import SPLIT_OF_ALIAS
from tuning.errors import UserError

WHOLE = "whole"  # the files of a folder whose names speak of no split
SHOWN = 8  # names of files in a sentence


def list_files(folder: Path) -> list[Path]:
    """All files below `folder` in the order of their names, without hidden ones."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    hidden = (".", "__MACOSX")
    return sorted(path for path in paths if not any(part.startswith(hidden) for part in path.relative_to(folder).parts))


def find_splits(folder: Path, present: Sequence[Path], suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """The data files among those `present` in `folder`, by split.

    A file's own name counts before those of its folders. Files whose names speak of no split are training data, unless
    others are called train: then they belong to no split. Where no name speaks of a split, all are `WHOLE`.
    """
    files = [file for file in present if file.name.lower().endswith(tuple(suffixes))]
    if not files:
        raise UserError(
            where=str(folder), problem=f"the folder has no {', '.join(suffixes)} file.", fix="Give another folder."
        )
    splits: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for file in files:
        split = _split_in_name(file.relative_to(folder))
        (splits.setdefault(split, []) if split else unnamed).append(file)
    if not splits:
        return {WHOLE: unnamed}
    if unnamed and "train" not in splits:
        splits["train"] = unnamed
    return dict(sorted(splits.items()))


def print_files(folder: Path, present: Sequence[Path], read: Sequence[Path]) -> None:
    """Print which of the files `present` in a folder are read, and which others there are, but for images."""
    images, known = Image.registered_extensions(), set(read)
    others = [file for file in present if file not in known and file.suffix.lower() not in images]
    left_out = f" Left out: {_list(folder, others)}." if others else ""
    print0(f"Files of {folder} that are read: {_list(folder, read)}.{left_out}")


def _list(folder: Path, files: Sequence[Path]) -> str:
    names = ", ".join(str(file.relative_to(folder)) for file in files[:SHOWN])
    return names + (f" and {len(files) - SHOWN:,} more" if len(files) > SHOWN else "")


def _split_in_name(path: Path) -> str | None:
    """The split in a file's name, or in that of the nearest folder: `docvqa_val.jsonl` is validation."""
    for part in reversed(path.parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        if found := [split for alias, split in SPLIT_OF_ALIAS.items() if alias in words]:
            return found[0]
    return None
