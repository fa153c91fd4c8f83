"""What `check` found, as plain data. `check.json`, the page and the printed summary are made from it."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tuning.data.encode import IGNORED, Encoder
from tuning.data.grounding import BoxOnImage
from tuning.data.images import thumbnail
from tuning.data.sources import Row

TEXT, SUPERVISED, IMAGE = "text", "supervised", "image"


@dataclass(frozen=True)
class Problem:
    """A bad row: `row` counts from 0 within `file`; `message` says where, what is wrong, and how to fix it."""

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
    """A row as the model sees it. `pictures` are data URIs of thumbnails of its images, `boxes` lie on them."""

    row: int
    file: str
    rendered_text: str
    supervised_text: list[str]
    tokens: list[Token]
    pictures: list[str] = field(default_factory=list)
    boxes: Sequence[BoxOnImage] = ()

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
    """Everything that `check` found.

    `totals`: counts by name. `lengths`: tokens per good row by role ("text" counts all but image tokens, "total"
    everything), arrays of equal length. `image_sizes`: the number of images by (width, height). `padding`: the share of
    padding in a batch, by the order of the rows. `estimates`: values by name, each with a text about how it was found.
    `settings`: texts by name: what trains, attention, and so on. `warnings`: not errors, but worth a look. `left_out`:
    row, file and tokens of rows that `overlong_rows drop` would leave out.
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
        """The problems by kind, the most frequent kind first."""
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
            "lengths": {name: summarize(values) for name, values in self.lengths.items()},
            "padding_share": dict(self.padding),
            "estimates": {name: {"value": value, "how": how} for name, (value, how) in self.estimates.items()},
            "settings": dict(self.settings),
            "samples": [sample.to_dict() for sample in self.samples],
        }


def summarize(values: np.ndarray) -> dict[str, float]:
    """Minimum, mean, quantiles and maximum of `values`; empty without values."""
    if not len(values):
        return {}
    quantiles = {f"p{percent}": float(np.percentile(values, percent)) for percent in (5, 50, 95, 99)}
    return {"min": int(values.min()), "mean": float(values.mean()), **quantiles, "max": int(values.max())}


def show_row(row: Row, encoder: Encoder) -> SampleRow:
    """Encode a row as training does, and keep what a page can show of it. Raises `UserError` for a bad row."""
    prepared = encoder.prepare(row)
    images = encoder.open_images(prepared)
    sample = encoder.encode_prepared(prepared, images)
    ids, labels = sample.sequence["input_ids"].tolist(), sample.sequence["labels"].tolist()
    tokens = [
        Token(number, text, IMAGE if number == encoder.image_token_id else SUPERVISED if label != IGNORED else TEXT)
        for number, text, label in zip(ids, token_texts(encoder.processor.tokenizer, ids), labels, strict=True)
    ]
    rendered = encoder.chat.escaper.unescape_text(prepared.chat.text)
    pictures = [thumbnail(image) for image in images]
    return SampleRow(row.number, row.file, rendered, supervised_texts(tokens), tokens, pictures, prepared.boxes)


def supervised_texts(tokens: list[Token]) -> list[str]:
    """The text of each unbroken run of supervised tokens: one per answer."""
    runs = itertools.groupby(tokens, key=lambda token: token.role)
    return ["".join(token.text for token in run) for role, run in runs if role == SUPERVISED]


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds. Where several tokens make one character, the last one has it."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        # Decoded together with the token before, because some tokenizers drop a leading space of the first token.
        anchor = tokenizer.decode(ids[start - 1 : start]) if start else ""
        text = tokenizer.decode(ids[max(start - 1, 0) : end])[len(anchor) :]
        if text.endswith("�") and end - start < 4 and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts
