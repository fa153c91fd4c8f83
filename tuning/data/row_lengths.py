"""Rows → how many tokens each has, from its text and the headers of its images. No image is decoded."""

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

from tuning.data import row_errors
from tuning.data.batch_sampler import NOT_TRAINED
from tuning.data.encode import Encoder, Prepared
from tuning.data.images import measure_image
from tuning.data.processing import IMAGE_TOKENS, PLACES
from tuning.data.row_warnings import find_ignored_keys
from tuning.data.sources import DataFile, Mixture, Row, Source
from tuning.data.token_spans import overlaps
from tuning.errors import UserError, try_optional

CHUNK = 64  # rows that a worker measures at a time
FEW_CHUNKS = 4  # starting worker processes for so few would take longer than measuring
COMPARED_SIZES = ((640, 480), (333, 1000), (50, 40))
SKIPPED = NOT_TRAINED, 0
BYTES_PER_TOKEN = 4  # of UTF-8; over all writing systems a better estimate than characters


@dataclass(frozen=True)
class Measured:
    """The figures that a row would have in training. `file` and `number` are the row's place.

    `ignored_keys`: keys of its messages without an effect. `left_out`: the row is too long, and `overlong_rows` is
    drop. `cut`: its answers are shortened. A bad row has an `error` and no figures.
    """

    file: int
    number: int
    tokens: int = 0
    image_tokens: int = 0
    supervised_tokens: int = 0
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    dropped_images: int = 0
    has_special_tokens: bool = False
    ignored_keys: tuple[str, ...] = ()
    left_out: bool = False
    cut: bool = False
    error: UserError | None = None


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a row: how many, and how many of them stand for images.

    `places` `[T, 2]`: characters of each token in the rendered text. `of_images` `[T]`: which ones stand for images,
    all of them or one for each image.
    """

    number: int
    image_tokens: int
    places: np.ndarray
    of_images: np.ndarray


class RowMeter:
    """Measures rows as an `Encoder` would encode them.

    `exact` renders and tokenizes the text. Otherwise only `tokens` is estimated, from the bytes of the text, which is
    several times as fast. `decode_images` decodes every image, to find broken ones.

    The tokens of an image depend on its size only. They come from the processor's own formula, if it has one that
    agrees with its output, or from processing a blank image of that size, once for each size. Where the processor
    changes more of a text than it reports, or takes prompts only, each row is processed with blank images.
    """

    def __init__(self, encoder: Encoder, *, exact: bool = True, decode_images: bool = False):
        self.encoder, self.exact, self.decode_images = encoder, exact, decode_images
        self._costs: dict[tuple[int, int], int] = {}
        self._has_formula = all(self._formula(size) == self._process_blank(size) for size in COMPARED_SIZES)

    def measure(self, rows: Sequence[Row], file: int = 0) -> list[Measured]:
        """Measure rows of one file. `file` is the file's number."""
        return self._measure_exactly(rows, file) if self.exact else [self._estimate(row, file) for row in rows]

    def sizes(self, rows: Sequence[Row], file: int = 0) -> list[tuple[int, int]]:
        """The tokens and the image tokens of each row in a batch. A bad row, or one that is left out, has `SKIPPED`."""
        measured = self.measure(rows, file)
        return [SKIPPED if row.error or row.left_out else (row.tokens, row.image_tokens) for row in measured]

    def _measure_exactly(self, rows: Sequence[Row], file: int) -> list[Measured]:
        measured: dict[int, Measured] = {}
        good: dict[int, tuple[Prepared, list[tuple[int, int]]]] = {}
        for index, row in enumerate(rows):
            try:
                prepared = self.encoder.prepare(row)
                good[index] = prepared, self._measure_images(prepared)
            except UserError as error:
                measured[index] = Measured(file, row.number, error=error)
        texts = [prepared.chat.text for prepared, _ in good.values()]
        tokenized = self._tokenize(texts) if self._adds_up else [None] * len(texts)
        for (index, (prepared, sizes)), tokens in zip(good.items(), tokenized, strict=True):
            try:
                counted = self._process(prepared, sizes) if tokens is None else self._count(prepared, sizes, *tokens)
                measured[index] = self._describe(file, prepared, sizes, counted)
            except UserError as error:
                measured[index] = Measured(file, prepared.row.number, error=error)
        return [measured[index] for index in range(len(rows))]

    def _measure_images(self, prepared: Prepared) -> list[tuple[int, int]]:
        if self.decode_images:
            return [image.size for image in self.encoder.open_images(prepared)]
        return self.encoder.measure_images(prepared)

    def _tokenize(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids `[T]` and character offsets `[T, 2]` of each text. Image placeholders are not expanded."""
        escaper, tokenizer = self.encoder.chat.escaper, self.encoder.processor.tokenizer
        plain = [text for text in texts if not escaper.is_escaped(text)]
        options = self.encoder.row_processor.tokenizer_options(plain[0]) if plain else {}
        batch = tokenizer(plain, return_offsets_mapping=True, **options) if plain else {}
        rows = zip(batch.get("input_ids", []), batch.get("offset_mapping", []), strict=True)
        pairs = ((np.asarray(ids), np.asarray(offsets)) for ids, offsets in rows)
        return [self._tokenize_escaped(text) if escaper.is_escaped(text) else next(pairs) for text in texts]

    def _tokenize_escaped(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        escaper, options = self.encoder.chat.escaper, self.encoder.row_processor.tokenizer_options(text)
        made = escaper.escaped_tokenizer([text], return_offsets_mapping=True, return_tensors="pt", **options)
        unescaped = escaper.unescape(dict(made), text)
        return unescaped["input_ids"][0].numpy(), unescaped["offset_mapping"][0].numpy()

    @functools.cached_property
    def _adds_up(self) -> bool:
        """Whether a row's tokens are those of its text and of each of its images, whatever their number."""
        processor = self.encoder.row_processor
        if not processor.reports_all or processor.takes_prompts:
            return False
        pair = [Image.new("RGB", size) for size in COMPARED_SIZES[:2]]
        both = try_optional(lambda: self.encoder.process_question(pair), catch_user_errors=True).value
        return both is None or int(both[IMAGE_TOKENS].sum()) == sum(self.image_cost(image.size) for image in pair)

    def _count(self, prepared: Prepared, sizes: list, ids: np.ndarray, offsets: np.ndarray) -> "_Tokens":
        """Add up the tokens of a text and of images."""
        self.encoder.check_ids(ids, prepared)
        written = self.encoder.row_processor.placeholders.finditer(prepared.chat.text)
        placeholders = overlaps(offsets, [found.span() for found in written])
        placeholders |= ids == self.encoder.image_token_id
        cost = try_optional(lambda: sum(self.image_cost(size) for size in sizes))  # the processor may refuse a size
        if cost.error is not None:
            raise row_errors.refused(prepared.row, cost.error, has_images=True) from cost.error
        image_tokens = cost.value or 0
        return _Tokens(len(ids) - int(placeholders.sum()) + image_tokens, image_tokens, offsets, placeholders)

    def _process(self, prepared: Prepared, sizes: list) -> "_Tokens":
        """The tokens of a row with blank images of these sizes."""
        inputs = self.encoder.process_row(prepared, [Image.new("RGB", size) for size in sizes])
        of_images = inputs[IMAGE_TOKENS][0].numpy()
        return _Tokens(len(of_images), int(of_images.sum()), inputs[PLACES][0].numpy(), of_images)

    def _describe(self, file: int, prepared: Prepared, sizes: list, counted: "_Tokens") -> Measured:
        encoder, chat, tokens = self.encoder, prepared.chat, counted.number
        trained = encoder.find_trained(counted.places, chat)
        trained &= ~counted.of_images
        trained[:1] = False
        row = Measured(
            file,
            prepared.row.number,
            tokens=tokens,
            image_tokens=counted.image_tokens,
            supervised_tokens=int(trained.sum()),
            image_sizes=sizes,
            dropped_images=prepared.dropped_images,
            has_special_tokens=encoder.chat.escaper.is_escaped(chat.text),
            ignored_keys=tuple(find_ignored_keys(encoder.chat, prepared.conversation)),
        )
        excess = tokens - encoder.max_seq_length
        if excess > 0:
            inside = (overlaps(counted.places, [content]) & ~counted.of_images for content in chat.contents)
            removable = sum(max(0, int(answer.sum()) - 1) for answer in inside)
            if encoder.overlong_rows == "truncate_text" and removable >= excess:
                left = max(1, row.supervised_tokens - excess - 1)  # the end token is not trained either
                return replace(row, tokens=encoder.max_seq_length, supervised_tokens=left, cut=True)
            if encoder.overlong_rows == "drop":
                return replace(row, left_out=True)
            raise row_errors.too_long(prepared.row, tokens, encoder.max_seq_length)
        if not trained.any():
            raise row_errors.nothing_trained(prepared.row)
        return row

    def _estimate(self, row: Row, file: int) -> Measured:
        encoder = self.encoder
        try:
            conversation = row.format.read(row.columns, row.where)
            images = conversation.images[: encoder.max_images]
            sizes = [measure_image(image, row.folder, row.where, encoder.image_rules) for image in images]
        except UserError as error:
            return Measured(file, row.number, error=error)
        cost = try_optional(lambda: sum(self.image_cost(size, rough=True) for size in sizes))
        texts = (part.get("text") or "" for message in conversation.messages for part in message["content"])
        tokens = sum(len(words.encode(errors="replace")) for words in texts) // BYTES_PER_TOKEN
        image_tokens = cost.value or 0  # encoding the row names what the processor refuses
        tokens += image_tokens
        limit = encoder.max_seq_length
        left_out = tokens > limit and encoder.overlong_rows == "drop"
        tokens = min(limit, max(tokens, NOT_TRAINED + 1))
        return Measured(file, row.number, tokens=tokens, image_tokens=image_tokens, left_out=left_out)

    def image_cost(self, size: tuple[int, int], *, rough: bool = False) -> int:
        """Tokens of an image of (width, height). `rough`: if there is no formula, those of an image of similar size."""
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
    """Some rows of a file, measured together."""

    def __init__(self, files: list[DataFile], chunks: Sequence[tuple[int, Sequence[int]]], measure: Callable):
        self.files, self.chunks, self.measure = files, chunks, measure

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> list[Any]:
        number, places = self.chunks[index]
        return self.measure(self.files[number].read_many(places), number)


def read_chunks(
    files: list[DataFile],
    chunks: Sequence[tuple[int, Sequence[int]]],
    measure: Callable[[list[Row], int], list[Any]],
    *,
    workers: int,
    start_worker: Callable | None = None,
) -> Iterator[list[Any]]:
    """Measure each chunk (a file's number, its rows' places) in turn, in `workers` processes."""
    rows = _Chunks(files, chunks, measure)
    generator = torch.Generator().manual_seed(0)  # otherwise the workers' seed comes from the generator of dropout
    options = {"num_workers": workers, "collate_fn": _unchanged, "worker_init_fn": start_worker, "generator": generator}
    return iter(DataLoader(rows, batch_size=None, **options))


def measure_rows(
    files: list[DataFile], meter: RowMeter, *, limit: int | None, workers: int
) -> Iterator[list[Measured]]:
    """Measure the rows of all files, or the first `limit`, in `workers` processes."""
    chunks, left = list[tuple[int, range]](), limit if limit is not None else sum(file.size for file in files)
    for number, file in enumerate(files):
        for start in range(0, min(file.size, left), CHUNK):
            chunks.append((number, range(start, min(start + CHUNK, file.size, left))))
        left -= min(file.size, left)
    return read_chunks(files, chunks, meter.measure, workers=workers)


def _unchanged(chunk: list[Any]) -> list[Any]:
    return chunk


class RowLengths:
    """Lengths in tokens of the rows of `source`. Each row is measured when its length is first needed.

    `exact`: see `RowMeter`. Rows that are not trained have the length `NOT_TRAINED`. A bad one is reported when it is
    encoded. `workers`: how many processes measure exactly. `start_worker` runs first in each of them.
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
        self.ends = [0, *itertools.accumulate(file.size for file in source.files)]
        self.known = np.zeros((self.ends[-1], 2), dtype=np.int32)  # of the rows of all files; 0: not measured yet

    def __call__(self, rows: Sequence[int]) -> np.ndarray:
        return self.sizes(rows)[:, 0]

    def sizes(self, rows: Sequence[int]) -> np.ndarray:
        """`[rows, 2]`: the tokens of each row, and how many of them stand for images."""
        places = (self.source.locate(row) for row in rows)
        numbers = np.array([self.ends[file] + row for file, row in places], dtype=np.int64)
        self._measure(np.unique(numbers[self.known[numbers, 0] == 0]))
        return self.known[numbers]

    def measure_all(
        self, add_up: Callable[[np.ndarray], np.ndarray], *, rank: int = 0, world: int = 1, show: bool
    ) -> None:
        """Measure every row. Each of `world` processes measures its share, and `add_up` adds up their lengths.

        `show` shows a progress bar.
        """
        total = len(self.known)
        self._measure(np.arange(total * rank // world, total * (rank + 1) // world), show=show and rank == 0)
        self.known = add_up(self.known)

    @functools.cached_property
    def _meter(self) -> RowMeter:
        return RowMeter(self.encoder, exact=self.exact)

    def _measure(self, numbers: np.ndarray, *, show: bool = False) -> None:
        """Measure rows given by their sorted numbers in `known`."""
        if not len(numbers):
            return
        chunks, places = [], []
        for file, (start, end) in enumerate(itertools.pairwise(self.ends)):
            inside = numbers[np.searchsorted(numbers, start) : np.searchsorted(numbers, end)]
            for first in range(0, len(inside), CHUNK):
                places.append(inside[first : first + CHUNK])
                chunks.append((file, (places[-1] - start).tolist()))
        workers = 0 if len(chunks) <= FEW_CHUNKS else self.workers
        measure = self._meter.sizes  # made before there are workers, each of which would make a meter of its own
        sizes = read_chunks(self.source.files, chunks, measure, workers=workers, start_worker=self.start_worker)
        with tqdm(total=len(numbers), desc="measuring rows", unit="row", disable=not show) as progress:
            for place, measured in zip(places, sizes, strict=True):
                self.known[place] = measured
                progress.update(len(place))
