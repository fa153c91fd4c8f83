"""What a check of a dataset found: pure data, from which `check.json`, the page and the printed summary are made."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tuning.data.encode import IGNORED, Encoder
from tuning.data.images import thumbnail
from tuning.data.sources import Row

TEXT, SUPERVISED, IMAGE = "text", "supervised", "image"


@dataclass(frozen=True)
class Problem:
    """A bad row: `row` counts from 0 within `file`; `message` says what is wrong, where, and how to mend it."""

    kind: str
    row: int
    field: str
    message: str
    file: str


@dataclass(frozen=True)
class Token:
    """One token of a row; `role` is TEXT, SUPERVISED or IMAGE."""

    id: int
    text: str
    role: str


@dataclass(frozen=True)
class SampleRow:
    """A row as the model sees it. `pictures` are data URIs of small versions of its images."""

    row: int
    file: str
    rendered_text: str
    supervised_text: list[str]
    tokens: list[Token]
    pictures: list[str] = field(default_factory=list)

    def count(self, role: str) -> int:
        return sum(token.role == role for token in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "file": self.file,
            "num_tokens": len(self.tokens),
            "num_image_tokens": self.count(IMAGE),
            "num_supervised_tokens": self.count(SUPERVISED),
            "supervised_text": self.supervised_text,
            "rendered_text": self.rendered_text,
        }


@dataclass(frozen=True)
class Report:
    """`totals`: counts by name. `lengths`: tokens per good row by role ("text" counts all but image tokens, "total"
    everything), arrays of equal length. `image_sizes`: how many images have a (width, height). `padding`: share of a
    batch that is padding, by order of the rows. `estimates`: figures by name, each with how it was found.
    `settings`: what trains, attention, and so on, in words, by name. `warnings`: what is no error but deserves a look.
    `left_out`: row, file and tokens of rows that are longer than max_seq_length and would be dropped.
    """

    model: str
    data: str
    totals: Mapping[str, int]
    problems: Sequence[Problem]
    lengths: Mapping[str, np.ndarray]
    image_sizes: Counter[tuple[int, int]]
    padding: Mapping[str, float]
    estimates: Mapping[str, tuple[float, str]]
    settings: Mapping[str, str]
    warnings: Sequence[str]
    samples: Sequence[SampleRow]
    left_out: Sequence[Mapping[str, Any]] = ()

    @property
    def is_clean(self) -> bool:
        return not self.problems

    def by_kind(self) -> dict[str, list[Problem]]:
        """The problems grouped by kind, the most frequent kind first."""
        kinds: dict[str, list[Problem]] = {}
        for problem in self.problems:
            kinds.setdefault(problem.kind, []).append(problem)
        return dict(sorted(kinds.items(), key=lambda entry: -len(entry[1])))

    def to_dict(self) -> dict[str, Any]:
        """The contents of `check.json`."""
        return {
            "model": self.model,
            "data": self.data,
            "clean": self.is_clean,
            "totals": dict(self.totals),
            "problems": [vars(problem) for problem in self.problems],
            "left_out": list(self.left_out),
            "warnings": list(self.warnings),
            "lengths": {name: describe(values) for name, values in self.lengths.items()},
            "padding_share": dict(self.padding),
            "estimates": {name: {"value": value, "how": how} for name, (value, how) in self.estimates.items()},
            "settings": dict(self.settings),
            "samples": [sample.to_dict() for sample in self.samples],
        }


def describe(values: np.ndarray) -> dict[str, float]:
    """Smallest, mean, quantiles and largest of `values`, in tokens; nothing of none."""
    if not len(values):
        return {}
    quantiles = {f"p{percent}": float(np.percentile(values, percent)) for percent in (5, 50, 95, 99)}
    return {"min": int(values.min()), "mean": float(values.mean()), **quantiles, "max": int(values.max())}


def show_row(row: Row, encoder: Encoder) -> SampleRow:
    """Encode a row as training does, and keep what there is to see of it. Raises `UserError` for a bad row."""
    prepared = encoder.prepare(row)
    sample = encoder.encode(row)
    pictures = [thumbnail(image) for image in encoder.open_images(prepared)]
    ids, labels = sample.sequence["input_ids"].tolist(), sample.sequence["labels"].tolist()
    tokens = [
        Token(number, text, IMAGE if number == encoder.image_token_id else SUPERVISED if label != IGNORED else TEXT)
        for number, text, label in zip(ids, token_texts(encoder.processor.tokenizer, ids), labels, strict=True)
    ]
    rendered = encoder.chat.escaper.unescape_text(prepared.chat.text)
    return SampleRow(row.number, row.file, rendered, supervised_texts(tokens), tokens, pictures)


def supervised_texts(tokens: list[Token]) -> list[str]:
    """The text of each unbroken run of supervised tokens: one an answer."""
    texts, before = list[str](), ""
    for token in tokens:
        if token.role == SUPERVISED:
            texts = [*texts[:-1], texts[-1] + token.text] if before == SUPERVISED else [*texts, token.text]
        before = token.role
    return texts


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; of several tokens that make one character, the last has it."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        # Decoded after an anchor: some tokenizers leave out the blank that a first token begins with.
        anchor = tokenizer.decode(ids[start - 1 : start]) if start else ""
        text = tokenizer.decode(ids[max(start - 1, 0) : end])[len(anchor) :]
        if text.endswith("�") and end - start < 4 and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts


def padding_share(tokens: np.ndarray, batch_size: int, order: np.ndarray) -> float:
    """Share of the positions of padded batches that is padding, with rows in `order`."""
    lengths = tokens[order]
    starts = np.arange(0, len(lengths), batch_size)
    if not len(starts):
        return 0.0
    longest = np.maximum.reduceat(lengths, starts)
    sizes = np.diff(np.append(starts, len(lengths)))
    return float(1 - lengths.sum() / (longest * sizes).sum())
