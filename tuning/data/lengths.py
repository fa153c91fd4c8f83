"""How long rows are in tokens: what batches of similar cost are made of. No image is decoded."""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from tuning.data.batching import NOT_TRAINED
from tuning.data.encode import Encoder
from tuning.data.images import measure_image
from tuning.data.measure import CHUNK, Measured, RowMeter, read_chunks
from tuning.data.sources import Mixture, Row, Source
from tuning.errors import UserError

BYTES_A_TOKEN = 4  # of UTF-8; closer for all writing systems together than characters
FEW_CHUNKS = 4  # starting processes for them would take longer


class RowLengths:
    """Lengths of the rows of `source`, each measured when first asked for.

    `exact`: in tokens as they are trained; else the text is not rendered or tokenized, but estimated from its bytes,
    which is several times as fast. Rows that are not trained count `NOT_TRAINED`: a bad one is met when it is
    encoded. `workers`: how many processes measure exactly, and `start_worker`, what each of them does first.
    """

    def __init__(
        self,
        source: Source | Mixture,
        encoder: Encoder,
        *,
        exact: bool = False,
        workers: int = 0,
        start_worker: Callable | None = None,
    ):
        self.source, self.encoder, self.exact = source, encoder, exact
        self.workers, self.start_worker = workers if exact else 0, start_worker
        self.ends = [0, *itertools.accumulate(part.size for part in source.parts)]
        self.known = np.zeros(self.ends[-1], dtype=np.int32)  # of the rows of all parts; 0: not measured yet
        self._meter: RowMeter | None = None

    def __call__(self, rows: Sequence[int]) -> np.ndarray:
        places = (self.source.place(row) for row in rows)
        numbers = np.array([self.ends[part] + row for part, row in places], dtype=np.int64)
        self._measure(np.unique(numbers[self.known[numbers] == 0]))
        return self.known[numbers]

    def measure_all(
        self, add_up: Callable[[np.ndarray], np.ndarray], *, rank: int = 0, world: int = 1, show: bool
    ) -> None:
        """Measure every row; each of `world` processes its share, which `add_up` then sums. `show`: a progress bar."""
        total = len(self.known)
        self._measure(np.arange(total * rank // world, total * (rank + 1) // world), show=show and rank == 0)
        self.known = add_up(self.known)

    def _measure(self, numbers: np.ndarray, *, show: bool = False) -> None:
        """Measure rows given by their sorted numbers in `known`."""
        if not len(numbers):
            return
        chunks, places = [], []
        for part, (start, end) in enumerate(itertools.pairwise(self.ends)):
            inside = numbers[np.searchsorted(numbers, start) : np.searchsorted(numbers, end)]
            for first in range(0, len(inside), CHUNK):
                places.append(inside[first : first + CHUNK])
                chunks.append((part, (places[-1] - start).tolist()))
        workers = 0 if len(chunks) <= FEW_CHUNKS else self.workers
        self._meter = self._meter or RowMeter(self.encoder)  # made before there are workers, which would each make one
        read = functools.partial(count_exactly if self.exact else estimate, self._meter)
        measured = read_chunks(self.source.parts, chunks, read, workers=workers, start_worker=self.start_worker)
        with tqdm(total=len(numbers), desc="measuring rows", unit="row", disable=not show) as progress:
            for place, lengths in zip(places, measured, strict=True):
                self.known[place] = lengths
                progress.update(len(place))


def count_exactly(meter: RowMeter, rows: list[tuple[int, Row]]) -> list[int]:
    """The tokens of some rows of one part."""
    by_number = {row.number: _tokens_of(row) for row in meter.measure(rows)}
    return [by_number[row.number] for _, row in rows]


def _tokens_of(row: Measured) -> int:
    return NOT_TRAINED if row.error is not None or row.left_out else row.tokens


def estimate(meter: RowMeter, rows: list[tuple[int, Row]]) -> list[int]:
    """About how many tokens rows have."""
    return [_estimate_row(meter, row) for _, row in rows]


def _estimate_row(meter: RowMeter, row: Row) -> int:
    encoder = meter.encoder
    try:
        conversation = row.form.read(row.columns, row.where)
        images = conversation.images[: encoder.max_images]
        sizes = [measure_image(image, row.folder, row.where, encoder.image_rules) for image in images]
    except UserError:
        return NOT_TRAINED
    texts = (part.get("text") or "" for message in conversation.messages for part in message["content"])
    text = sum(len(words.encode(errors="replace")) for words in texts) // BYTES_A_TOKEN
    length = text + sum(meter.image_cost(size, rough=True) for size in sizes)
    if length <= encoder.max_seq_length:
        return max(length, NOT_TRAINED + 1)
    return NOT_TRAINED if encoder.overlong_rows == "drop" else encoder.max_seq_length
