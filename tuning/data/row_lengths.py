"""Rows → how many tokens each would have, from their text and the headers of their images, without decoding one."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tuning.data.batch_sampler import NOT_TRAINED
from tuning.data.encode import Encoder, Prepared, overlaps
from tuning.data.images import load_image, measure_image
from tuning.data.sources import Mixture, Part, Row, Source
from tuning.errors import UserError, error_field

CHUNK = 64  # rows that a worker measures at a time
COMPARED_SIZES = ((640, 480), (333, 1000), (50, 40))


@dataclass(frozen=True)
class Measured:
    """What a row would be in training. `left_out`: longer than allowed, with `overlong_rows drop`; `cut`: shortened."""

    part: int
    number: int
    tokens: int = 0
    image_tokens: int = 0
    supervised_tokens: int = 0
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    dropped_images: int = 0
    has_controls: bool = False
    left_out: bool = False
    cut: bool = False
    error: UserError | None = None


class RowMeter:
    """Measures rows exactly as an `Encoder` would encode them.

    An image's tokens depend on its size only. They come from the processor's own formula where it has one that agrees
    with what it does, else from processing a blank image of that size, once for each size.
    """

    def __init__(self, encoder: Encoder, *, decode_images: bool = False):
        self.encoder, self.decode_images = encoder, decode_images
        self._costs: dict[tuple[int, int], int] = {}
        self._has_formula = all(self._formula(size) == self._process_blank(size) for size in COMPARED_SIZES)

    def measure(self, rows: Sequence[tuple[int, Row]]) -> list[Measured]:
        """Measure rows, each with the number of its part. A bad row has an `error` instead of figures."""
        measured: list[Measured] = []
        good: list[tuple[int, Prepared, list[tuple[int, int]]]] = []
        for part, row in rows:
            try:
                prepared = self.encoder.prepare(row)
                good.append((part, prepared, self._sizes(prepared)))
            except UserError as error:
                measured.append(Measured(part, row.number, error=error))
        encoded = self._tokenize([prepared.chat.text for _, prepared, _ in good])
        for (part, prepared, sizes), (ids, offsets) in zip(good, encoded, strict=True):
            measured.append(self._count(part, prepared, sizes, ids, offsets))
        return measured

    def _sizes(self, prepared: Prepared) -> list[tuple[int, int]]:
        row, rules = prepared.row, self.encoder.image_rules
        places = zip(prepared.images, prepared.image_places, strict=True)
        with error_field(row.format.image_field or row.format.text_fields[0]):
            if self.decode_images:
                return [load_image(image, row.folder, place, rules).size for image, place in places]
            return [measure_image(image, row.folder, place, rules) for image, place in places]

    def _tokenize(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids `[T]` and character offsets `[T, 2]` of each text, image placeholders not expanded."""
        controls, tokenizer = self.encoder.chat.controls, self.encoder.processor.tokenizer
        plain = [text for text in texts if not controls.is_hidden_in(text)]
        options = self.encoder.tokenizer_options(plain[0]) if plain else {}
        batch = tokenizer(plain, return_offsets_mapping=True, **options) if plain else {}
        together = zip(batch.get("input_ids", []), batch.get("offset_mapping", []), strict=True)
        pairs = ((np.asarray(ids), np.asarray(offsets)) for ids, offsets in together)
        return [self._tokenize_controls(text) if controls.is_hidden_in(text) else next(pairs) for text in texts]

    def _tokenize_controls(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        controls, options = self.encoder.chat.controls, self.encoder.tokenizer_options(text)
        made = controls.escaped_tokenizer([text], return_offsets_mapping=True, return_tensors="pt", **options)
        revealed = controls.unescape(dict(made))
        return revealed["input_ids"][0].numpy(), revealed["offset_mapping"][0].numpy()

    def _count(self, part: int, prepared: Prepared, sizes: list, ids: np.ndarray, offsets: np.ndarray) -> Measured:
        encoder, chat = self.encoder, prepared.chat
        placeholders = ids == encoder.image_token_id
        image_tokens = sum(self.image_cost(size) for size in sizes)
        tokens = len(ids) - int(placeholders.sum()) + image_tokens
        trained = overlaps(offsets, chat.spans) if encoder.assistant_only_loss else np.ones(len(ids), dtype=bool)
        trained &= ~placeholders
        trained[:1] = False
        row = Measured(
            part,
            prepared.row.number,
            tokens=tokens,
            image_tokens=image_tokens,
            supervised_tokens=int(trained.sum()),
            image_sizes=sizes,
            dropped_images=prepared.dropped_images,
            has_controls=encoder.chat.controls.is_hidden_in(chat.text),
        )
        excess = tokens - encoder.max_seq_length
        if excess > 0:
            shortest = [
                max(0, int((overlaps(offsets, [content]) & ~placeholders).sum()) - 1) for content in chat.contents
            ]
            if encoder.overlong_rows == "truncate_text" and sum(shortest) >= excess:
                left = max(1, row.supervised_tokens - excess - 1)  # nor is the end token trained
                return replace(row, tokens=encoder.max_seq_length, supervised_tokens=left, cut=True)
            if encoder.overlong_rows == "drop":
                return replace(row, left_out=True)
            return Measured(part, prepared.row.number, error=encoder.too_long(prepared, tokens))
        if not trained.any():
            return Measured(part, prepared.row.number, error=encoder.nothing_trained(prepared))
        return row

    def image_cost(self, size: tuple[int, int], *, rough: bool = False) -> int:
        """Tokens that an image of (width, height) takes. `rough`: where there is no formula, that of similar size."""
        if rough and not self._has_formula:
            size = (1 << (size[0] - 1).bit_length(), 1 << (size[1] - 1).bit_length())
        if size not in self._costs:
            self._costs[size] = self._formula(size) if self._has_formula else self._process_blank(size)
        return self._costs[size]

    def _formula(self, size: tuple[int, int]) -> int:
        formula = getattr(self.encoder.processor, "_get_num_multimodal_tokens", None)
        if formula is None:
            return -1
        return int(formula(image_sizes=[(size[1], size[0])])["num_image_tokens"][0])

    def _process_blank(self, size: tuple[int, int]) -> int:
        return self.encoder.count_image_tokens(Image.new("RGB", size))


class _Chunks(Dataset):
    """Some rows of a part, read as columns at once: row by row `datasets` takes several times as long."""

    def __init__(self, parts: list[Part], chunks: Sequence[tuple[int, Sequence[int]]], measure: Callable):
        self.parts, self.chunks, self.measure = parts, chunks, measure

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> list[Any]:
        p, numbers = self.chunks[index]
        part = self.parts[p]
        columns = part.rows[numbers]
        rows = [
            (p, part.row(number, {name: values[place] for name, values in columns.items()}))
            for place, number in enumerate(numbers)
        ]
        return self.measure(rows)


def read_chunks(
    parts: list[Part],
    chunks: Sequence[tuple[int, Sequence[int]]],
    measure: Callable[[list[tuple[int, Row]]], list[Any]],
    *,
    workers: int,
    start_worker: Callable | None = None,
) -> Iterator[list[Any]]:
    """What `measure` makes of each chunk (a part's number, its rows' numbers) in turn, in `workers` processes."""
    rows = _Chunks(parts, chunks, measure)
    generator = torch.Generator().manual_seed(0)  # else the workers' seed is drawn from the one that dropout draws from
    options = {"num_workers": workers, "collate_fn": _as_it_is, "worker_init_fn": start_worker, "generator": generator}
    return iter(DataLoader(rows, batch_size=None, **options))


def measure_rows(parts: list[Part], meter: RowMeter, *, limit: int | None, workers: int) -> Iterator[list[Measured]]:
    """Measure the rows of all parts, the first `limit` of them if given, in `workers` processes."""
    chunks, left = list[tuple[int, range]](), limit if limit is not None else sum(part.size for part in parts)
    for p, part in enumerate(parts):
        for start in range(0, min(part.size, left), CHUNK):
            chunks.append((p, range(start, min(start + CHUNK, part.size, left))))
        left -= min(part.size, left)
    return read_chunks(parts, chunks, meter.measure, workers=workers)


def _as_it_is(chunk: list[Any]) -> list[Any]:
    return chunk


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
        conversation = row.format.read(row.columns, row.where)
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
