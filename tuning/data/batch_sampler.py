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
from tuning.errors import UserError

# Rows are sorted by length within a window of this many optimizer steps, and of this many rows. A smaller window leaves
# more padding. A larger one makes training wait for the lengths of its rows.
STEPS_OF_WINDOW, LEAST_ROWS, MOST_ROWS = 16, 1024, 4096
NOT_TRAINED = 1  # the length of a row that is bad or left out: one untrained token takes its place
PACKED_ROWS = 2048  # rows that are packed together under a token budget

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

    An epoch is a sequence of items, which subclasses give: single rows, or whole batches. Every `block_size` items are
    a block, in which each process has one batch. All processes have the same number of batches: in the last, smaller
    block a process may get an empty one. (accelerate repeats the first rows of the epoch there.) `drop_last` leaves
    that block out.

    `padded`: whether batches are padded. You may set it until the first batch is read.
    """

    def __init__(self, block_size: int, *, rank: int = 0, world: int = 1, drop_last: bool = False, padded: bool = True):
        self.block_size, self.rank, self.world, self.drop_last = block_size, rank, world, drop_last
        self.padded, self.epoch, self.skipped = padded, 0, 0

    def begin(self, epoch: int, skipped: int = 0) -> None:
        """Choose the epoch to read. Its first `skipped` batches were trained before: they are given as empty lists."""
        self.epoch, self.skipped = epoch, skipped

    def __len__(self) -> int:
        whole, rest = divmod(self.count_items(), self.block_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([] for _ in range(self.skipped))
        items = self.read_items(self.skipped * self.block_size)
        for number in itertools.count(self.skipped):
            block = list(itertools.islice(items, self.block_size))
            if not block or (len(block) < self.block_size and self.drop_last):
                return
            yield self.take_share(block, number)

    def count_items(self) -> int:
        """The items of an epoch, of all processes together."""
        raise NotImplementedError

    def read_items(self, first: int) -> Iterator[Any]:
        """The items of the chosen epoch, from number `first` on."""
        raise NotImplementedError

    def take_share(self, block: list[Any], number: int) -> list[int]:
        """This process's rows of a block, which is the block `number` of its epoch."""
        raise NotImplementedError


class RowBatches(SharedBatches):
    """Batches of `batch_size` rows for each process.

    All processes together train the same rows in a step as one process with `batch_size · world` rows a batch. The rows
    of the last, smaller block are dealt out evenly.
    """

    def __init__(self, order: RowOrder, batch_size: int, *, world: int = 1, **share: Any):
        super().__init__(batch_size * world, world=world, **share)
        self.order = order

    def count_items(self) -> int:
        return len(self.order)

    def read_items(self, first: int) -> Iterator[int]:
        self.order.epoch = self.epoch
        return self.order.starting_at(first, padded=self.padded)

    def take_share(self, block: list[int], number: int) -> list[int]:
        place = place_in_turn(self.rank, self.world, number)
        return block[len(block) * place // self.world : len(block) * (place + 1) // self.world]


class TokenBatches(SharedBatches):
    """Batches of at most `budget` tokens, each in one process.

    Windows of a random order, which `seed` decides, are packed into batches once, so every epoch has the same number of
    steps. In each epoch the windows are shuffled, and the batches within each. Then they are cut into optimizer steps
    of `world · accumulation` batches. A step has the same batches however that product is split.

    `endless`: epochs follow one another without a short step between them, and there is no length. Rows are measured
    when their window is reached. `padded` decides how batches are filled: see `pack`.
    """

    def __init__(
        self,
        rows: int,
        lengths: Lengths,
        budget: int,
        *,
        seed: int,
        accumulation: int = 1,
        world: int = 1,
        endless: bool = False,
        **share: Any,
    ):
        super().__init__(world, world=world, **share)
        self.lengths, self.budget, self.seed = lengths, budget, seed
        self.accumulation, self.endless = accumulation, endless
        self.windows = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).split(PACKED_ROWS)
        self._count: int | None = None
        self._warned = False

    def count_items(self) -> int:
        """The batches of an epoch, of all processes together. Measures all rows."""
        if self._count is None:
            self._count = sum(len(self._pack(number)) for number in range(len(self.windows)))
        return self._count

    def __len__(self) -> int:
        if self.endless:
            raise TypeError("endless batches have no length")
        return super().__len__()

    def read_items(self, first: int) -> Iterator[list[int]]:
        return itertools.islice(self._read_steps(), first, None)

    def _read_steps(self) -> Iterator[list[int]]:
        epochs = itertools.count(self.epoch) if self.endless else [self.epoch]
        batches = itertools.chain.from_iterable(map(self._shuffle, epochs))
        while step := list(itertools.islice(batches, self.world * self.accumulation)):
            yield from sorted(step, key=len)  # processes that wait for each other then have rows of similar length

    def take_share(self, block: list[list[int]], number: int) -> list[int]:
        place = place_in_turn(self.rank, self.world, number % self.accumulation)
        return block[place] if place < len(block) else []

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
        return [window[batch].tolist() for batch in pack(lengths, self.budget, padded=self.padded)]


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


def make_row_batches(
    training: TrainingArguments, rows: int, lengths: Lengths, group_by_length: bool | None
) -> RowBatches:
    """The training batches of `per_device_train_batch_size` rows each."""
    seed = None if training.train_sampling_strategy == "sequential" else data_seed(training)
    size, share = training.train_batch_size, _share_of_process(training)
    group = size * training.world_size * training.gradient_accumulation_steps
    return RowBatches(RowOrder(rows, seed, lengths, group, group_by_length), size, **share)


def make_token_batches(
    training: TrainingArguments, rows: int, lengths: Lengths, budget: int, *, padded: bool
) -> TokenBatches:
    """The training batches of at most `budget` tokens each. Where `max_steps` ends the run, they are not counted."""
    return TokenBatches(
        rows,
        lengths,
        budget,
        seed=data_seed(training),
        padded=padded,
        accumulation=training.gradient_accumulation_steps,
        endless=training.max_steps > 0,
        **_share_of_process(training),
    )


def _share_of_process(training: TrainingArguments) -> dict[str, Any]:
    return {"rank": training.process_index, "world": training.world_size, "drop_last": training.dataloader_drop_last}


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
        batches.padded = order_padded
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
