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


def after_expansion(spans: Sequence[Span], expansions: Sequence[dict]) -> list[Span]:
    """Move spans of the rendered text to their place in the text with expanded image placeholders.

    `expansions` are in order; see `expansions_of`.
    """
    ends = [expansion["span"][1] for expansion in expansions]
    growth = [0, *(expansion["new_span"][1] - expansion["span"][1] for expansion in expansions)]

    def move(position: int) -> int:
        return position + growth[int(np.searchsorted(ends, position, side="right"))]

    return [(move(start), move(end)) for start, end in spans]


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
