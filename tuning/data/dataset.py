"""Encoded rows for a DataLoader, by number or as a stream."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from tuning.data.collator import Collator
from tuning.data.encode import Encoder, Sample, Skipped
from tuning.data.sources import Mixture, Row, Source, Stream
from tuning.errors import UserError

SHUFFLED_ROWS = 1000  # streamed rows in memory from which the next is drawn


def encode_row(row: Row | UserError, encoder: Encoder, skip_bad_rows: bool) -> Sample | UserError:
    """Encode a row. Returns the `UserError` of a bad row, or with `skip_bad_rows` a placeholder `Sample`.

    Raised in a worker process, the error would reach the user inside the worker's traceback.
    """
    if isinstance(row, UserError):
        return row  # no row can be read after this one, so it cannot be skipped
    try:
        return encoder.encode(row)
    except UserError as error:
        if not skip_bad_rows:
            return error
        return encoder.placeholder(row.where, Skipped(row.number, error.field, str(error), bad=True))


class EncodedRows(Dataset):
    """Rows that are encoded when they are read."""

    def __init__(self, source: Source | Mixture, encoder: Encoder, *, skip_bad_rows: bool = False):
        self.source, self.encoder, self.skip_bad_rows = source, encoder, skip_bad_rows

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample | UserError:
        return encode_row(self.source[index], self.encoder, self.skip_bad_rows)


class StreamedRows(IterableDataset):
    """Streamed rows of process `rank` of `world`, epoch after epoch without end, in an order that only `seed` decides.

    A block has `batch_size` rows for each process. Each of W workers reads all rows, and worker w gives its process's
    share of blocks w, W + w, …, so the order of batches depends neither on W nor on `world`. `start`: the first block,
    for a resumed run. The blocks before it are read, but their images are not decoded.
    """

    def __init__(self, stream: Stream, *, batch_size: int, seed: int, rank: int = 0, world: int = 1, start: int = 0):
        self.stream, self.batch_size, self.seed, self.rank, self.world = stream, batch_size, seed, rank, world
        self.start = start

    def __iter__(self) -> Iterator[Row | UserError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self.start * self.batch_size * self.world
        for index, row in enumerate(itertools.islice(self._read_epochs(), first, None)):
            block, place = divmod(index // self.batch_size, self.world)
            if place == self.rank and block % workers == number:
                yield row

    def _read_epochs(self) -> Iterator[Row | UserError]:
        for epoch in itertools.count():
            choose = random.Random(f"{self.seed} {epoch}")
            rows = shuffle_nearby(self.stream.one_epoch(choose), choose)
            first = next(rows, None)
            if first is None:  # another epoch would have no row either
                yield UserError(where=self.stream.files[0].name, problem="there are no rows.", fix="Give other data.")
                return
            yield first
            yield from rows


def shuffle_nearby(rows: Iterator[Row | UserError], choose: random.Random) -> Iterator[Row | UserError]:
    """Each row once, drawn at random from the next `SHUFFLED_ROWS`."""
    held = list(itertools.islice(rows, SHUFFLED_ROWS))
    for row in rows:
        place = choose.randrange(len(held))
        held[place], row = row, held[place]
        yield row
    choose.shuffle(held)
    yield from held


class EncodingCollator:
    """Encodes streamed rows when it makes a batch of them, so that workers encode as they do with `EncodedRows`."""

    def __init__(self, encoder: Encoder, collator: Collator, skip_bad_rows: bool):
        self.encoder, self.collator, self.skip_bad_rows = encoder, collator, skip_bad_rows

    def __call__(self, rows: Sequence[Row | UserError]) -> dict[str, Any]:
        return self.collator([encode_row(row, self.encoder, self.skip_bad_rows) for row in rows])
