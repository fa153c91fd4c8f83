"""A source seen through an encoder: what the DataLoader's workers index, or read one after the other."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from tuning.data.collator import Collator
from tuning.data.encode import Encoder, Sample, Skipped
from tuning.data.sources import Mixture, Row, Source, Stream
from tuning.errors import UserError

SHUFFLED_ROWS = 1000  # how many streamed rows are held to choose the next from


def encode_row(row: Row | UserError, encoder: Encoder, skip_bad_rows: bool) -> Sample | UserError:
    """Encode a row. A bad one is returned as its `UserError`, or as a `Sample` without labels that takes its place.

    Raised inside a worker process, the error's message would reach the user buried in the worker's traceback.
    """
    if isinstance(row, UserError):
        return row  # the data ends here: there is nothing to skip to
    try:
        return encoder.encode(row)
    except UserError as error:
        if not skip_bad_rows:
            return error
        return encoder.placeholder(row.where, Skipped(row.number, error.field, str(error), bad=True))


class EncodedRows(Dataset):
    """Rows encoded when asked for."""

    def __init__(self, source: Source | Mixture, encoder: Encoder, *, skip_bad_rows: bool = False):
        self.source, self.encoder, self.skip_bad_rows = source, encoder, skip_bad_rows

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample | UserError:
        return encode_row(self.source[index], self.encoder, self.skip_bad_rows)


class StreamedRows(IterableDataset):
    """Streamed rows of process `rank` of `world`, epoch after epoch without end, in an order that only `seed` decides.

    Rows come in blocks of `batch_size` for each process. With W workers, worker w reads all rows and passes on its
    process's share of block w, W + w, …, so that the order of batches depends neither on W nor on `world`. `start`:
    the block to begin with, for a run that goes on; the blocks before it are read, but no image in them is decoded.
    """

    def __init__(self, stream: Stream, *, batch_size: int, seed: int, rank: int = 0, world: int = 1, start: int = 0):
        self.stream, self.batch_size, self.seed, self.rank, self.world = stream, batch_size, seed, rank, world
        self.start = start

    def __iter__(self) -> Iterator[Row | UserError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self.start * self.batch_size * self.world
        for index, row in enumerate(itertools.islice(self._endless(), first, None)):
            block, place = divmod(index // self.batch_size, self.world)
            if place == self.rank and block % workers == number:
                yield row

    def _endless(self) -> Iterator[Row | UserError]:
        for epoch in itertools.count():
            choose = random.Random(f"{self.seed} {epoch}")
            yield from shuffle_nearby(self.stream.one_epoch(choose), choose)


def shuffle_nearby(rows: Iterator[Row | UserError], choose: random.Random) -> Iterator[Row | UserError]:
    """Every row once, each drawn at random from the next `SHUFFLED_ROWS`."""
    held = list(itertools.islice(rows, SHUFFLED_ROWS))
    for row in rows:
        place = choose.randrange(len(held))
        held[place], row = row, held[place]
        yield row
    choose.shuffle(held)
    yield from held


class EncodingCollator:
    """Encodes streamed rows as it batches them: the workers' share of the work is what it is with `EncodedRows`."""

    def __init__(self, encoder: Encoder, collator: Collator, skip_bad_rows: bool):
        self.encoder, self.collator, self.skip_bad_rows = encoder, collator, skip_bad_rows

    def __call__(self, rows: Sequence[Row | UserError]) -> dict[str, Any]:
        return self.collator([encode_row(row, self.encoder, self.skip_bad_rows) for row in rows])
