"""Which rows go into a batch together, and which of them a process takes."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

# Rows are sorted by length within windows of so many optimizer steps, and of so many rows: fewer rows leave more
# padding, more make training wait for their lengths.
STEPS_OF_WINDOW, LEAST_ROWS, MOST_ROWS = 16, 1024, 4096
NOT_TRAINED = 1  # the length of a row that is bad or left out: one untrained token takes its place

Lengths = Callable[[Sequence[int]], np.ndarray]


class RowOrder(Sampler[int]):
    """The numbers of all rows, epoch after epoch in an order that only `seed`, the epoch and `group` decide.

    Every process has the same order, whatever their number, and a resumed run goes on with the same rows. Without a
    seed rows stand as they are.

    `lengths` gives the lengths of some rows. With it, rows of similar length stand together in groups of `group`, the
    rows of an optimizer step: windows of the epoch's random order are sorted and cut, and the groups shuffled within
    their window. Rows that fill no group are drawn at random and come last. `grouped`: whether to do so; None: where
    batches are padded.
    """

    def __init__(
        self,
        rows: int,
        seed: int | None = None,
        lengths: Lengths | None = None,
        group: int = 1,
        grouped: bool | None = None,
    ):
        self.rows, self.seed, self.lengths, self.group, self.grouped = rows, seed, lengths, group, grouped
        self.epoch = 0
        self.window = group * min(max(STEPS_OF_WINDOW, -(-LEAST_ROWS // group)), max(1, MOST_ROWS // group))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return self.starting_at(0)

    def starting_at(self, first: int, *, padded: bool = True) -> Iterator[int]:
        """The order from its row `first` on; windows that lie before it are not measured."""
        if self.seed is None:
            yield from range(first, self.rows)
            return
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.rows, generator=generator)
        if self.lengths is None or not (padded if self.grouped is None else self.grouped):
            for rows in order[first:].split(MOST_ROWS):
                yield from rows.tolist()
            return
        whole, end = self.rows - self.rows % self.group, 0
        for window in (*order[:whole].split(self.window), order[whole:]):
            shuffled = torch.randperm(-(-len(window) // self.group), generator=generator)
            start, end = end, end + len(window)
            if first < end:
                yield from self._arrange(window.numpy(), shuffled.tolist())[max(0, first - start) :]

    def _arrange(self, window: np.ndarray, shuffled: Sequence[int]) -> list[int]:
        """Cut the rows of a window into groups of similar length, in the order `shuffled`; longest first in each."""
        assert self.lengths is not None
        lengths = spread_untrained(self.lengths(window.tolist()))
        rows = window[np.argsort(-lengths, kind="stable")]
        return [row for number in shuffled for row in rows[number * self.group :][: self.group].tolist()]


def spread_untrained(lengths: np.ndarray) -> np.ndarray:
    """Put rows that are not trained among others at random, lest there be steps of nothing else."""
    trained = np.where(lengths > NOT_TRAINED, np.arange(len(lengths)), 0)
    return lengths[np.maximum.accumulate(trained)]


def place_in_turn(rank: int, world: int, number: int) -> int:
    """Which share of a sorted batch a process takes: every other time they are dealt out the other way round.

    So the longest rows of a step's accumulated batches do not all fall to the same process.
    """
    return rank if number % 2 == 0 else world - 1 - rank


class SharedBatches(Sampler[list[int]]):
    """The share of process `rank` of `world` in batches of `batch_size` rows a process.

    A step of all processes together has the same rows as one process with `batch_size · world` rows has in it, the
    last, smaller one included: its rows are dealt out evenly, and a process may get none, an empty list. (accelerate
    repeats the first rows of the epoch there.)

    `padded`: whether batches are padded; may be set until they are iterated.
    """

    padded = True
    skipped = 0

    def __init__(self, order: RowOrder, batch_size: int, *, rank: int = 0, world: int = 1, drop_last: bool = False):
        self.order, self.batch_size, self.rank, self.world, self.drop_last = order, batch_size, rank, world, drop_last

    def begin(self, epoch: int, skipped: int) -> None:
        """The next epoch to iterate; its first `skipped` batches were trained before: they come empty."""
        self.order.set_epoch(epoch)
        self.skipped = skipped

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.batch_size * self.world)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size * self.world
        rows = self.order.starting_at(self.skipped * size, padded=self.padded)
        yield from ([] for _ in range(self.skipped))
        for number in range(self.skipped, len(self)):
            block = list(itertools.islice(rows, size))
            place = place_in_turn(self.rank, self.world, number)
            yield block[len(block) * place // self.world : len(block) * (place + 1) // self.world]
