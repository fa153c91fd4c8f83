"""Where characters of a rendered conversation are among the tokens that the processor makes of it."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

EXPANSIONS = "text_replacement_offsets"  # of a processor's output: how it expanded the image placeholders
Span = tuple[int, int]
"""Characters of a text: the first, and the one after the last."""


def expansions_of(inputs: dict[str, Any]) -> list[dict]:
    """How the processor expanded the image placeholders of its one text.

    `span` is a placeholder in the rendered text, `new_span` its place in the expanded one.
    """
    return (inputs.get(EXPANSIONS) or [[]])[0]


def grown(expansion: dict) -> int:
    """How many characters later the text goes on after an expansion."""
    return expansion["new_span"][1] - expansion["span"][1]


def is_insertion(expansion: dict) -> bool:
    """Whether it stands for no placeholder: see `add_insertion`."""
    return expansion["span"][0] == expansion["span"][1]


def after_expansion(spans: Sequence[Span], expansions: Sequence[dict]) -> list[Span]:
    """Move spans of the rendered text to their place in the text with expanded image placeholders.

    `expansions` are in order; see `expansions_of`.
    """
    ends = [expansion["span"][1] for expansion in expansions]
    growth = [0, *map(grown, expansions)]

    def move(position: int) -> int:
        return position + growth[int(np.searchsorted(ends, position, side="right"))]

    return [(move(start), move(end)) for start, end in spans]


def add_insertion(expansions: Sequence[dict], text: str, layout: str) -> list[dict]:
    """`expansions`, and what a processor inserts into `text` to make `layout`, in which it expands placeholders.

    PaliGemma's inserts the first token after the images, and reports only the images.
    """
    start = shared_start(text, layout)
    length = layout.find(text[start:], start) - start
    if length <= 0:
        return list(expansions)
    before = [expansion for expansion in expansions if expansion["span"][1] <= start]
    place = start + (grown(before[-1]) if before else 0)
    inserted = {"span": (start, start), "new_span": (place, place + length)}
    after = [
        {**expansion, "span": tuple(end - length for end in expansion["span"])}
        for expansion in expansions[len(before) :]
    ]
    return [*before, inserted, *after]


def report_insertion(inputs: dict[str, Any], text: str, processor: Any, images: Sequence[Any]) -> dict[str, Any]:
    """A processor's output for `text`, whose expansions also have what the processor inserts without reporting it."""
    expansions = expansions_of(inputs)
    reported = len(text) + (grown(expansions[-1]) if expansions else 0)
    if int(inputs["offset_mapping"].max()) == reported or not hasattr(processor, "prepare_inputs_layout"):
        return inputs
    layout = processor.prepare_inputs_layout(images=list(images) or None, text=[text])[1][0]
    return inputs | {EXPANSIONS: [add_insertion(expansions, text, layout)]}


def overlaps(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens, with character `offsets` `[T, 2]`, share a character with any of `spans`. Boolean `[T]`."""
    hit = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        hit |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return hit


def shared_start(one: Sequence, other: Sequence) -> int:
    """The number of items, or characters, that both begin with."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
