"""Batches of as many rows as a budget of tokens holds, and which of them a process takes."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from tuning.console import say
from tuning.data.batching import Lengths, place_in_turn

WINDOW = 2048  # rows that are packed together


def pack(lengths: np.ndarray, budget: int, *, padded: bool) -> list[np.ndarray]:
    """Positions in `lengths`, cut into as few batches as hold `budget` tokens each: padding-free ones in the sum of
    their rows, padded ones in rows × longest. A longer row is a batch of its own. First-fit decreasing.
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


class TokenBatches(Sampler[list[int]]):
    """The share of process `rank` of `world` in batches of at most `budget` tokens, each in one process at a time.

    Windows of a random order, which `seed` decides, are packed into batches; these stay as they are, so that every
    epoch has the same number of steps. Their order, which `seed` and the epoch decide, is shuffled by windows and
    within each, and cut into optimizer steps of `world · accumulation` batches. So a step has the same batches however
    that product is split, and every process the same number of steps: where a last step has too few batches, some
    processes get an empty one.

    `endless`: epochs follow one another, without a short step between them, and there is no length; rows are measured
    when their window is reached. `padded`: see `pack`.
    """

    def __init__(
        self,
        rows: int,
        lengths: Lengths,
        budget: int,
        *,
        seed: int,
        padded: bool,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        endless: bool = False,
    ):
        self.lengths, self.budget, self.seed, self.padded = lengths, budget, seed, padded
        self.accumulation, self.rank, self.world, self.drop_last = accumulation, rank, world, drop_last
        self.endless, self.epoch, self.warned = endless, 0, False
        self.windows = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).split(WINDOW)
        self._number: int | None = None

    def begin(self, epoch: int) -> None:
        """The next epoch to iterate."""
        self.epoch = 0 if self.endless else epoch

    def number_of_batches(self) -> int:
        """How many there are in an epoch, all processes together. Measures all rows."""
        if self._number is None:
            self._number = sum(len(self._pack(number)) for number in range(len(self.windows)))
        return self._number

    def __len__(self) -> int:
        if self.endless:
            raise TypeError("endless batches have no length")
        whole, rest = divmod(self.number_of_batches(), self.world)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        epochs = itertools.count() if self.endless else [self.epoch]
        batches = itertools.chain.from_iterable(map(self._shuffled, epochs))
        while step := list(itertools.islice(batches, self.world * self.accumulation)):
            step.sort(key=len)  # processes that wait for each other then have rows of similar length
            for number, first in enumerate(range(0, len(step), self.world)):
                block, place = step[first : first + self.world], place_in_turn(self.rank, self.world, number)
                if len(block) == self.world or not self.drop_last:
                    yield block[place] if place < len(block) else []

    def _shuffled(self, epoch: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        for number in torch.randperm(len(self.windows), generator=generator).tolist():
            batches = self._pack(number)
            yield from (batches[n] for n in torch.randperm(len(batches), generator=generator).tolist())

    def _pack(self, number: int) -> list[list[int]]:
        window = self.windows[number]
        lengths = self.lengths(window.tolist())
        if lengths.max() > self.budget and not self.warned:
            self.warned = True
            longest = f"one has {lengths.max()} tokens"
            say(f"Rows of more than max_tokens_per_batch {self.budget} are batches of their own: {longest}.")
        return [window[batch].tolist() for batch in pack(lengths, self.budget, padded=self.padded)]
