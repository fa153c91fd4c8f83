"""Which rows go into a batch together, and which of them a process takes."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerState, TrainingArguments

from tuning.console import print0
from tuning.data.balance import Balance, share_out
from tuning.data.packing import fill_evenly, pack
from tuning.errors import UserError

# Rows are sorted by length within a window of this many optimizer steps, and of this many rows. A smaller window leaves
# more padding. A larger one makes training wait for the lengths of its rows.
STEPS_OF_WINDOW, LEAST_ROWS, MOST_ROWS = 16, 1024, 4096
NOT_TRAINED = 1  # the length of a row that is bad or left out: one untrained token takes its place
PACKED_ROWS = 2048  # rows that are packed together under a token budget
SORTED_STEPS = 8  # steps whose batches are sorted by cost: more would agree better, and be measured earlier
FINENESS = 64  # costs are sorted by this part of their mean, so that batches of about the same cost stay shuffled

Lengths = Callable[[Sequence[int]], np.ndarray]


class RowOrder(Sampler[int]):
    """The numbers of all rows, in an order that only `seed`, the epoch and `group` decide.

    Every process has the same order, however many there are, so a resumed run continues with the same rows. Without a
    seed, rows keep their order.

    `lengths` gives the lengths of some rows. With it, rows of similar length are put together in groups of `group`, the
    rows of an optimizer step: windows of the epoch's random order are sorted by length and cut into groups, and the
    groups of a window are shuffled. Rows that fill no group are drawn at random and come last. `grouped` turns this on
    or off. None turns it on where batches are padded.
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

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return self.starting_at(0)

    def starting_at(self, first: int, *, padded: bool = True) -> Iterator[int]:
        """The order from its row `first` on. Windows before that row are not measured."""
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
        for window in (*order[:whole].split(min(self.window, max(1, self.rows))), order[whole:]):
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
    """Scatter skipped rows among the others by giving each the length of the trained row before it.

    By their own length they would come together, and some optimizer steps would train nothing.
    """
    trained = np.where(lengths > NOT_TRAINED, np.arange(len(lengths)), 0)
    return lengths[np.maximum.accumulate(trained)]


def place_in_turn(rank: int, world: int, number: int) -> int:
    """Which share of a sorted block process `rank` takes. Every other block is dealt out in reverse.

    Otherwise the longest rows of all accumulated batches would fall to the same process.
    """
    return rank if number % 2 == 0 else world - 1 - rank


class SharedBatches(Sampler[list[int]]):
    """The batches of process `rank` of `world`, as lists of row numbers.

    An epoch is a sequence of batches, which subclasses give. Every `world` of them are a block, in which each process
    has one. All processes have the same number of batches: in the last block a process may get an empty one.
    (accelerate repeats the first rows of the epoch there.) `drop_last` leaves out a block that is not full.

    `accumulation` blocks are an optimizer step. With `balance`, the processes have batches of similar cost in a block,
    and in a step. Which rows a step has does not depend on the split into processes and accumulated batches.

    `padded`: whether rows are ordered as for padded batches. `pads`: whether they are padded. You may set both until
    the first batch is read.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        balance: Balance | None = None,
        drop_last: bool = False,
        padded: bool = True,
    ):
        self.rank, self.world, self.accumulation, self.drop_last = rank, world, accumulation, drop_last
        self.balance, self.padded, self.pads, self.epoch, self.skipped = balance, padded, padded, 0, 0

    def begin(self, epoch: int, skipped: int = 0) -> None:
        """Choose the epoch to read. Its first `skipped` batches were trained before: they are given as empty lists."""
        self.epoch, self.skipped = epoch, skipped

    def __len__(self) -> int:
        whole, rest = divmod(self.count_batches(), self.world)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([] for _ in range(self.skipped))
        batches = self.read_batches(self.skipped * self.world)
        for number, block in enumerate(_cut(batches, self.world), start=self.skipped):
            if len(block) < self.world and self.drop_last:
                return
            place = self.find_place(number)
            yield block[place] if place < len(block) else []

    def find_place(self, number: int) -> int:
        """Which batch of a block this process takes. The block is the block `number` of its epoch."""
        return self.rank if self.balance else place_in_turn(self.rank, self.world, number)

    def share_out(self, step: list[list[int]], *, padded: bool) -> list[list[int]]:
        """The batches of a step, in the order in which the processes take them in turn."""
        assert self.balance is not None
        costs = [self.balance.of_batch(batch, padded=padded) for batch in step]
        return [step[place] for place in share_out(costs, self.world)]

    def count_batches(self) -> int:
        """The batches of an epoch, of all processes together."""
        raise NotImplementedError

    def read_batches(self, first: int) -> Iterator[list[int]]:
        """The batches of the chosen epoch, from number `first` on."""
        raise NotImplementedError


def _cut(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while part := list(itertools.islice(items, size)):
        yield part


class RowBatches(SharedBatches):
    """Batches of `batch_size` rows for each process.

    All processes together train the same rows in a step as one process with `batch_size · world` rows a batch. The rows
    of the last, smaller block are dealt out evenly.
    """

    def __init__(self, order: RowOrder, batch_size: int, **share: Any):
        super().__init__(**share)
        self.order, self.of_block = order, batch_size * self.world
        self.rows = len(order) // self.of_block * self.of_block if self.drop_last else len(order)

    def count_batches(self) -> int:
        return -(-self.rows // self.of_block) * self.world

    def read_batches(self, first: int) -> Iterator[list[int]]:
        self.order.epoch = self.epoch
        step, start = self.of_block * self.accumulation, first // self.world * self.of_block
        rows = self.order.starting_at(start - start % step, padded=self.padded)
        steps = _cut(itertools.islice(rows, self.rows - start + start % step), step)
        batches = itertools.chain.from_iterable(map(self._make_step, steps))
        return itertools.islice(batches, first % (self.world * self.accumulation), None)

    def _make_step(self, rows: list[int]) -> list[list[int]]:
        blocks = list(_cut(iter(rows), self.of_block))
        batches = [
            block[len(block) * place // self.world : len(block) * (place + 1) // self.world]
            for block in blocks
            for place in range(self.world)
        ]
        if not self.balance:
            return batches
        if not self.pads:  # padded batches have rows of similar length, which they would lose
            dealt = fill_evenly(self.balance.of_rows(rows), np.ones(len(rows), dtype=np.int64), [*map(len, batches)])
            assert dealt is not None  # each row weighs 1, and has a place
            batches = [[rows[position] for position in batch.tolist()] for batch in dealt]
        return self.share_out(batches, padded=self.pads)


class TokenBatches(SharedBatches):
    """Batches of at most `budget` tokens, each in one process.

    Windows of a random order, which `seed` decides, are packed into batches once, so every epoch has the same number of
    steps. In each epoch the windows are shuffled, and the batches within each. Then they are cut into optimizer steps
    of `world · accumulation` batches. A step has the same batches however that product is split.

    `endless`: epochs follow one another without a short step between them, and there is no length. Rows are measured
    when their window is reached. `padded` decides how batches are filled: see `pack`. With `balance`, padding-free
    batches of a window have nearly equal costs, and a step has batches of similar cost.
    """

    def __init__(
        self,
        rows: int,
        lengths: Lengths,
        budget: int,
        *,
        seed: int,
        endless: bool = False,
        **share: Any,
    ):
        super().__init__(**share)
        self.lengths, self.budget, self.seed, self.endless = lengths, budget, seed, endless
        self.windows = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).split(PACKED_ROWS)
        self._count: int | None = None
        self._warned = False

    def count_batches(self) -> int:
        """The batches of an epoch, of all processes together. Measures all rows."""
        if self._count is None:
            self._count = sum(len(self._pack(number)) for number in range(len(self.windows)))
        return self._count

    def __len__(self) -> int:
        if self.endless:
            raise TypeError("endless batches have no length")
        return super().__len__()

    def read_batches(self, first: int) -> Iterator[list[int]]:
        return itertools.islice(self._read_steps(), first, None)

    def find_place(self, number: int) -> int:
        return super().find_place(number % self.accumulation)

    def _read_steps(self) -> Iterator[list[int]]:
        epochs = itertools.count(self.epoch) if self.endless else [self.epoch]
        batches: Iterator[list[int]] = itertools.chain.from_iterable(map(self._shuffle, epochs))
        if self.balance:
            batches = self._sort_by_cost(batches)
        for step in _cut(batches, self.world * self.accumulation):
            if self.balance:
                yield from self.share_out(step, padded=self.padded)
            else:
                yield from sorted(step, key=len)  # processes that wait for each other then have similar rows

    def _sort_by_cost(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        """Bring batches of similar cost into the same step. Those that fill no step come last, as they are."""
        assert self.balance is not None
        generator, size = torch.Generator().manual_seed(self.seed + self.epoch), self.world * self.accumulation
        for window in _cut(batches, SORTED_STEPS * size):
            whole = len(window) // size * size
            costs = np.array([self.balance.of_batch(batch, padded=self.padded) for batch in window[:whole]])
            order = np.argsort(costs // max(1, int(costs.sum()) // (FINENESS * max(1, whole))), kind="stable")
            steps = order.reshape(-1, size)[torch.randperm(whole // size, generator=generator).numpy()]
            yield from (window[position] for position in steps.flatten().tolist())
            yield from window[whole:]

    def _shuffle(self, epoch: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        for number in torch.randperm(len(self.windows), generator=generator).tolist():
            batches = self._pack(number)
            yield from (batches[n] for n in torch.randperm(len(batches), generator=generator).tolist())

    def _pack(self, number: int) -> list[list[int]]:
        window = self.windows[number]
        lengths = self.lengths(window.tolist())
        if lengths.max() > self.budget and not self._warned:
            self._warned = True
            print0(
                f"Some rows have more tokens than max_tokens_per_batch {self.budget}: each is a batch of its own. One"
                f" has {lengths.max()} tokens."
            )
        batches: Sequence[np.ndarray] = pack(lengths, self.budget, padded=self.padded)
        if self.balance and not self.padded:
            weights = np.minimum(lengths, self.budget).astype(np.int64)
            even = fill_evenly(self.balance.of_rows(window.tolist()), weights, [self.budget] * len(batches))
            batches = batches if even is None else even
        return [window[batch].tolist() for batch in batches]


def make_row_batches(
    training: TrainingArguments,
    rows: int,
    lengths: Lengths,
    group_by_length: bool | None,
    balance: Balance | None = None,
) -> RowBatches:
    """The training batches of `per_device_train_batch_size` rows each. In sequential order, nothing is balanced."""
    seed = None if training.train_sampling_strategy == "sequential" else data_seed(training)
    size, share = training.train_batch_size, _share_of_process(training)
    group = size * training.world_size * training.gradient_accumulation_steps
    balance = None if seed is None or training.world_size == 1 else balance
    return RowBatches(RowOrder(rows, seed, lengths, group, group_by_length), size, balance=balance, **share)


def make_token_batches(
    training: TrainingArguments,
    rows: int,
    lengths: Lengths,
    budget: int,
    *,
    padded: bool,
    balance: Balance | None = None,
) -> TokenBatches:
    """The training batches of at most `budget` tokens each. Where `max_steps` ends the run, they are not counted.

    One process balances as several would, unless a step has a single batch.
    """
    alone = training.world_size * training.gradient_accumulation_steps == 1
    return TokenBatches(
        rows,
        lengths,
        budget,
        seed=data_seed(training),
        padded=padded,
        endless=training.max_steps > 0,
        balance=None if alone else balance,
        **_share_of_process(training),
    )


def _share_of_process(training: TrainingArguments) -> dict[str, Any]:
    return {
        "rank": training.process_index,
        "world": training.world_size,
        "accumulation": training.gradient_accumulation_steps,
        "drop_last": training.dataloader_drop_last,
    }


def data_seed(training: TrainingArguments) -> int:
    """The seed of the order of rows."""
    return training.seed if training.data_seed is None else training.data_seed


def begin_epoch(
    batches: SharedBatches, training: TrainingArguments, state: TrainerState, *, padded: bool, order_padded: bool
) -> None:
    """Choose the epoch to read and pass over its finished steps, before its first batch.

    `padded`: whether batches are padded. `order_padded`: whether rows are ordered as for padded batches.
    """
    endless = isinstance(batches, TokenBatches) and batches.endless
    if not isinstance(batches, TokenBatches):
        batches.padded, batches.pads = order_padded, padded
    elif padded and not batches.padded:
        if not endless or state.global_step:
            raise UserError(
                where="max_tokens_per_batch",
                problem="this model's batches must be padded, but they were filled as if they were not.",
                fix="Set padding_free false.",
            )
        batches.padded = True  # nothing has been measured or packed yet
    epoch, accumulated = int(state.epoch or 0), training.gradient_accumulation_steps
    done = state.global_step
    if endless:
        epoch = 0
    else:
        done %= max(1, math.ceil(len(batches) / accumulated))
    batches.begin(epoch, 0 if training.ignore_data_skip else done * accumulated)
