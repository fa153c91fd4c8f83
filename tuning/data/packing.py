"""Rows → batches of at most so many tokens, or of so many rows."""

from collections.abc import Sequence

import numpy as np


def pack(lengths: np.ndarray, budget: int, *, padded: bool) -> list[np.ndarray]:
    """Positions in `lengths`, cut into as few batches of at most `budget` tokens as first-fit decreasing finds.

    A padding-free batch has the sum of its rows' tokens, a padded one rows × longest. A row longer than the budget is a
    batch of its own.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    if padded:
        batches, start = [], 0
        while start < len(longest_first):
            size = max(1, budget // int(lengths[longest_first[start]]))
            batches.append(longest_first[start : start + size])
            start += size
        return batches
    room, contents = np.full(len(lengths), budget), list[list[int]]()
    for position in longest_first.tolist():
        length = min(int(lengths[position]), budget)
        batch = int(np.argmax(room >= length))
        room[batch] -= length
        if batch == len(contents):
            contents.append([])
        contents[batch].append(position)
    return [np.array(batch) for batch in contents]


def fill_evenly(costs: np.ndarray, weights: np.ndarray, rooms: Sequence[int]) -> list[np.ndarray] | None:
    """Positions in `costs`, in a batch for each of `rooms`, the weight that it may hold. None where they do not fit.

    Each row goes into the batch that costs least so far and has room, the heaviest row first, of these the costliest.
    """
    room, totals = np.array(rooms, dtype=np.int64), np.zeros(len(rooms), dtype=np.int64)
    contents: list[list[int]] = [[] for _ in rooms]
    for position in np.lexsort((-costs, -weights)).tolist():
        fitting = np.flatnonzero(room >= weights[position])
        if not len(fitting):
            return None
        batch = int(fitting[totals[fitting].argmin()])
        room[batch] -= weights[position]
        totals[batch] += costs[position]
        contents[batch].append(position)
    return [np.array(batch, dtype=np.int64) for batch in contents]
