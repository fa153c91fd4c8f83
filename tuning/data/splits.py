"""Splits of a dataset, and parts of them, such as `train[:50%]` or `train+validation`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from datasets import ReadInstruction

from tuning.data.sources import DataFile
from tuning.errors import UserError

ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_ALIAS = {alias: split for split, aliases in ALIASES.items() for alias in aliases}

OpenSplit = Callable[[str], list[DataFile]]
"""The files of a split, by its name."""


def read_splits(wanted: str, name: str, known: Sequence[str] | None, open_split: OpenSplit) -> list[DataFile]:
    """The rows of the splits that `wanted` names, or of parts of them.

    `name`: the dataset's, for errors. `known`: the splits there are; None where only `open_split` finds out. Raises
    `UserError` where there is no such split, or a part has no row.
    """
    files = []
    parts = [part.strip() for part in wanted.split("+")]
    for part in parts:
        split = part.partition("[")[0].strip()
        if known is not None:
            split = find_split(split, known, name)
        opened = open_split(split)
        if len(parts) > 1:
            opened = [
                replace(file, name=f"{file.name} ({split})", origin=file.name) if file.split else file
                for file in opened
            ]
        files += _slice(opened, part, split, name) if "[" in part else opened
    return files


def find_split(split: str, known: Sequence[str], name: str) -> str:
    """The split called `split`, or by another usual name of it: `val` and `dev` are `validation`."""
    same = [other for other in known if SPLIT_OF_ALIAS.get(other, other) == SPLIT_OF_ALIAS.get(split, split)]
    if split not in known and not same:
        raise UserError(
            where=name,
            problem=f"there is no split '{split}', only: {', '.join(known)}.",
            fix="Set dataset_split, or give the files of the split you want.",
        )
    return split if split in known else same[0]


def _slice(files: list[DataFile], part: str, split: str, name: str) -> list[DataFile]:
    """The rows of `files`, one after another, that `part` names, such as `train[10:20]`."""
    sizes = [file.size for file in files]
    if not all(sizes):
        raise UserError(
            where=name,
            problem=f"dataset_split {part} needs the number of rows, which streaming does not know.",
            fix=f"Set dataset_split {split}, or leave streaming out.",
        )
    try:
        asked = f"{split}[{part.partition('[')[2]}"
        instruction = ReadInstruction.from_spec("rows" + asked.removeprefix(split))
        chosen = instruction.to_absolute({"rows": sum(sizes)})[0]
    except (ValueError, AssertionError) as error:
        raise UserError(
            where=name,
            problem=f"dataset_split {part} is not a part of a split.",
            fix="Write it like train[:50%] or train[10:20].",
        ) from error
    start, end = chosen.from_, chosen.to
    if start >= end:
        raise UserError(
            where=name,
            problem=f"dataset_split {part} has no row: there are {sum(sizes)}.",
            fix="Set another dataset_split.",
        )
    kept = []
    for file, size in zip(files, sizes, strict=True):
        if start < size and end > 0:
            kept.append(file.keep(range(max(0, start), min(size, end))))
        start, end = start - size, end - size
    return kept
