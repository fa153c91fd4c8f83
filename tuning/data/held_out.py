"""Holds rows of the training data out for validation."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tuning.data.sources import DataFile, Source
from tuning.errors import UserError

Key = tuple[str, str]
"""What tells files apart, however they are written: the file on the disk, and the split."""


@dataclass(frozen=True)
class HeldOut:
    """The rows of each dataset that remain for training, and all rows that are held out."""

    train: list[Source]
    validation: Source


def hold_out(sources: Sequence[Source], amount: float, seed: int) -> HeldOut:
    """Hold out a share of all rows (`amount` below 1) or a number of them, drawn by `seed` only.

    Each dataset gives in proportion to its rows. Rows that several datasets read count for the first of them, and leave
    them all. Raises `UserError` where no row is left to train on, or none is held out.
    """
    files: dict[Key, DataFile] = {}
    seen: dict[Key, np.ndarray] = {}
    rows: list[list[tuple[Key, np.ndarray]]] = []  # of each dataset: what no dataset before it reads
    for source in sources:
        rows.append([])
        for file in source.files:
            key, before = _key(file), seen.get(_key(file), np.empty(0, np.int64))
            files.setdefault(key, file)
            rows[-1].append((key, np.setdiff1d(_numbers(file), before)))
            seen[key] = np.union1d(before, _numbers(file))
    shares = share_out([sum(len(numbers) for _, numbers in own) for own in rows], amount)

    held = {key: np.empty(0, np.int64) for key in files}
    for dataset, (own, share) in enumerate(zip(rows, shares, strict=True)):
        ends = np.cumsum([len(numbers) for _, numbers in own])
        drawn = np.array(random.Random(f"{seed} {dataset}").sample(range(ends[-1]), share), dtype=np.int64)
        for (key, numbers), end in zip(own, ends, strict=True):
            places = drawn - (end - len(numbers))
            chosen = numbers[places[(places >= 0) & (places < len(numbers))]]
            held[key] = np.union1d(held[key], chosen)
    return HeldOut(
        [Source([_without(file, held[_key(file)]) for file in source.files]) for source in sources],
        Source([replace(files[key], numbers=numbers) for key, numbers in held.items() if len(numbers)]),
    )


def share_out(sizes: Sequence[int], amount: float) -> list[int]:
    """How many rows each of several datasets holds out. Each keeps at least one row to train on."""
    total = sum(sizes)
    wanted = round(amount * total) if amount < 1 else int(amount)
    most = [max(0, size - 1) for size in sizes]
    if not wanted or wanted > sum(most):
        raise UserError(
            where=f"validation_split {amount:g}",
            problem=f"{wanted:,} of {total:,} rows would be held out, and every dataset needs a row to train on."
            if wanted
            else f"none of {total:,} rows would be held out.",
            fix="Set another share or number.",
        )
    exact = [size * wanted / total for size in sizes]
    shares = [min(int(share), limit) for share, limit in zip(exact, most, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda place: shares[place] - exact[place])
    while sum(shares) < wanted:
        for place in by_remainder:
            if shares[place] < most[place] and sum(shares) < wanted:
                shares[place] += 1
    return shares


def _key(file: DataFile) -> Key:
    name = file.origin or file.name
    if not os.path.exists(name):
        return (name, file.split)
    state = os.stat(name)
    return (f"{state.st_dev} {state.st_ino}", file.split)


def _numbers(file: DataFile) -> np.ndarray:
    return np.arange(file.size) if file.numbers is None else np.asarray(file.numbers)


def _without(file: DataFile, numbers: np.ndarray) -> DataFile:
    return replace(file, numbers=np.setdiff1d(_numbers(file), numbers)) if len(numbers) else file
