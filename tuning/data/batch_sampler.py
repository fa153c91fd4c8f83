"""Which rows go into a batch together, and which of them a process takes."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerState, TrainingArguments

from tuning.console import print0
from tuning.errors import UserError

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
        lengths = scatter_skipped(self.lengths(window.tolist()))
        rows = window[np.argsort(-lengths, kind="stable")]
        return [row for number in shuffled for row in rows[number * self.group :][: self.group].tolist()]


def scatter_skipped(lengths: np.ndarray) -> np.ndarray:
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
            print0(f"Rows of more than max_tokens_per_batch {self.budget} are batches of their own: {longest}.")
        return [window[batch].tolist() for batch in pack(lengths, self.budget, padded=self.padded)]


def share_batches(
    training: TrainingArguments, rows: int, lengths: Lengths, group_by_length: bool | None
) -> SharedBatches:
    """Batches of `per_device_train_batch_size` rows each."""
    seed = None if training.train_sampling_strategy == "sequential" else data_seed(training)
    size, rank, world = training.train_batch_size, training.process_index, training.world_size
    group = size * world * training.gradient_accumulation_steps
    order = RowOrder(rows, seed, lengths, group, group_by_length)
    return SharedBatches(order, size, rank=rank, world=world, drop_last=training.dataloader_drop_last)


def pack_batches(
    training: TrainingArguments, rows: int, lengths: Lengths, budget: int, *, padded: bool
) -> TokenBatches:
    """Batches of at most `budget` tokens each; where `max_steps` ends the run, without counting those of an epoch."""
    return TokenBatches(
        rows,
        lengths,
        budget,
        seed=data_seed(training),
        padded=padded,
        accumulation=training.gradient_accumulation_steps,
        rank=training.process_index,
        world=training.world_size,
        drop_last=training.dataloader_drop_last,
        endless=training.max_steps > 0,
    )


def data_seed(training: TrainingArguments) -> int:
    return training.seed if training.data_seed is None else training.data_seed


def begin_epoch(
    batches: SharedBatches | TokenBatches,
    training: TrainingArguments,
    state: TrainerState,
    *,
    padding: bool,
    padded: bool,
) -> None:
    """Before an epoch's first batch. Steps that are done are passed over, without measuring their rows if possible.

    `padding`: whether batches are padded; `padded`: whether rows are ordered as for padded batches.
    """
    if isinstance(batches, TokenBatches) and padding and not batches.padded:
        if not batches.endless or state.global_step:
            what = "this model's batches must be padded, which shows only now; they were filled as if they were not."
            raise UserError(where="max_tokens_per_batch", problem=what, fix="Set padding_free false.")
        batches.padded = True  # nothing was measured or packed yet
    epoch, accumulated = int(state.epoch or 0), training.gradient_accumulation_steps
    if isinstance(batches, TokenBatches):
        batches.begin(epoch)
        return
    batches.padded = padded
    done = state.global_step % max(1, math.ceil(len(batches) / accumulated))
    batches.begin(epoch, 0 if training.ignore_data_skip else done * accumulated)
