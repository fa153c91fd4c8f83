"""A row that is too long → the same row with shorter answers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tuning.data.chat_template import RenderedChat
from tuning.data.token_spans import Span, after_expansion, expansions_of, overlaps


@dataclass(frozen=True)
class CutRow:
    """`inputs`: the processor's output without the tokens that were cut.

    `not_trained`: spans of the expanded text that must not be trained any more. They are the ends of turn of the
    answers that were cut: trained, they would teach the model to stop in the middle of a sentence.
    """

    inputs: dict[str, Any]
    not_trained: list[Span]


def cut_answers(inputs: dict[str, Any], chat: RenderedChat, image_tokens: np.ndarray, excess: int) -> CutRow | None:
    """Cut `excess` tokens off the ends of answers, the last answer first.

    Each answer keeps at least one token. Images (`image_tokens`, boolean `[T]`) and all other text stay. Returns None
    where even then the row is too long.
    """
    offsets = inputs["offset_mapping"][0].numpy()
    moved = after_expansion([*chat.contents, *chat.spans], expansions_of(inputs))
    contents, spans = moved[: len(chat.spans)], moved[len(chat.spans) :]
    keep, not_trained = np.ones(len(offsets), dtype=bool), []
    for content, span in zip(reversed(contents), reversed(spans), strict=True):
        words = np.flatnonzero(overlaps(offsets, [content]) & ~image_tokens)
        end = len(words) - min(excess, len(words) - 1)
        while 1 < end < len(words) and offsets[words[end], 0] < offsets[words[end - 1], 1]:
            end -= 1  # several tokens may make one character: it is kept or cut as a whole
        if end < len(words):
            keep[words[end:]] = False
            excess -= len(words) - end
            not_trained.append((content[1], span[1]))
        if excess <= 0:
            break
    if excess > 0:
        return None
    kept = torch.from_numpy(np.flatnonzero(keep))
    shorter = {
        name: value[:, kept] if torch.is_tensor(value) and value.shape[:2] == (1, len(offsets)) else value
        for name, value in inputs.items()
    }
    return CutRow(shorter, not_trained)
