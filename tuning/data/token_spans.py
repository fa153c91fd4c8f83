"""Where the tokens that a processor makes of a rendered text are in that text.

A processor rewrites the text before it is tokenized. A change is a pair of spans: of the rendered text, and of the text
that was read in its place. An image's placeholder becomes many tokens. An insertion has an empty first span.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

Span = tuple[int, int]
"""Characters of a text: the first, and the one after the last."""
Change = tuple[Span, Span]
NOWHERE = -1  # the place of a token that is not in the rendered text


def reported_changes(expansions: Iterable[dict], text: str, read: str) -> list[Change] | None:
    """The changes that a processor reports (`span`, `new_span`), or None if they do not make `read` of `text`."""
    changes = [(tuple(expansion["span"]), tuple(expansion["new_span"])) for expansion in expansions]
    place, place_read = 0, 0
    for (start, end), (start_read, end_read) in [*changes, ((len(text),) * 2, (len(read),) * 2)]:
        if text[place:start] != read[place_read:start_read]:
            return None
        place, place_read = end, end_read
    return changes


def find_changes(text: str, read: str, placeholder: str, needed: Sequence[Span] = ()) -> list[Change] | None:
    """The changes that make `read` of `text`, if what stands between the placeholders of images was left as it is.

    None where a part of the text is not found, where one with a `needed` span could be in several places, or where
    `read` has a placeholder of its own.
    """
    parts = text.split(placeholder) if placeholder else [text]
    starts = [0, *itertools.accumulate(len(part) + len(placeholder) for part in parts[:-1])]
    first = _place_in_turn(parts, read)
    turned = _place_in_turn([part[::-1] for part in reversed(parts)], read[::-1])
    if first is None or turned is None:
        return None
    if not parts[-1]:  # the text ends with an image, of which we cannot see the end
        first[-1] = len(read)
    last = [len(read) - place - len(part) for part, place in zip(parts, reversed(turned), strict=True)]
    for part, start, *places in zip(parts, starts, first, last, strict=True):
        is_needed = part and any(begin < start + len(part) and end > start for begin, end in needed)
        if is_needed and places[0] != places[1]:
            return None
    ends = [(start + len(part), place + len(part)) for part, start, place in zip(parts, starts, first, strict=True)]
    changes = [
        ((end, start), (end_read, start_read))
        for (end, end_read), start, start_read in zip(
            [(0, 0), *ends], [*starts, len(text)], [*first, len(read)], strict=True
        )
        if end < start or end_read < start_read
    ]
    inserted = [read[slice(*new)] for old, new in changes if old[0] == old[1]]
    has_placeholders = len(parts) > 1
    return None if has_placeholders and any(placeholder in words for words in inserted) else changes


def _place_in_turn(parts: Sequence[str], text: str) -> list[int] | None:
    """The first place of each part behind the one before and what became of an image, or None if there is none."""
    places, start = list[int](), 0
    for part in parts:
        place = text.find(part, start)
        if place < 0:
            return None
        places.append(place)
        start = place + len(part) + 1
    return places


def undo_changes(offsets: np.ndarray, changes: Sequence[Change]) -> np.ndarray:
    """Character offsets `[T, 2]` in the text that was read → in the rendered text.

    A token that stands for a placeholder has the placeholder's place, an inserted one is `NOWHERE`.
    """
    if not changes:
        return offsets
    ends = np.array([new[1] for _, new in changes])
    growth = np.array([0, *(new[1] - old[1] for old, new in changes)])
    behind = np.searchsorted(ends, offsets[:, 0], side="right")  # the number of changes before each token
    undone = offsets - growth[behind][:, None]
    changed = overlaps(offsets, [new for _, new in changes])
    places = np.array([old if old[0] < old[1] else (NOWHERE, NOWHERE) for old, _ in changes])
    undone[changed] = places[behind[changed]]
    return undone


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
