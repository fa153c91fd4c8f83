"""Which rows go into a batch together, and which of them a process takes."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class RowOrder(Sampler[int]):
    """The numbers of all rows, epoch after epoch in an order that only `seed` and the epoch decide.

    Every process has the same order, whatever their number, and a resumed run goes on with the same rows. Without a
    seed rows stand as they are. With `lengths`, rows of similar length stand together in groups of `group`, so that
    less padding is computed.
    """

    def __init__(self, rows: int, seed: int | None = None, lengths: Sequence[int] | None = None, group: int = 1):
        self.rows, self.seed, self.lengths, self.group, self.epoch = rows, seed, lengths, group, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            return iter(range(self.rows))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is not None:
            return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))
        return iter(torch.randperm(self.rows, generator=generator).tolist())


class SharedBatches(Sampler[list[int]]):
    """The share of process `rank` of `world` in batches of `batch_size` rows a process.

    A step of all processes together has the same rows as one process with `batch_size · world` rows has in it, the
    last, smaller one included: its rows are dealt out evenly, and a process may get none, an empty list. (accelerate
    repeats the first rows of the epoch there.)
    """

    def __init__(self, order: RowOrder, batch_size: int, *, rank: int = 0, world: int = 1, drop_last: bool = False):
        self.order, self.batch_size, self.rank, self.world, self.drop_last = order, batch_size, rank, world, drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.batch_size * self.world)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        rows = iter(self.order)
        for _ in range(len(self)):
            block = list(itertools.islice(rows, self.batch_size * self.world))
            start, end = (len(block) * number // self.world for number in (self.rank, self.rank + 1))
            yield block[start:end]
