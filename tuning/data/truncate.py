"""A row that is too long → the same row with shorter answers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tuning.data.chat_template import RenderedChat
from tuning.data.processing import IMAGE_TOKENS, PLACES
from tuning.data.token_spans import Span, overlaps


@dataclass(frozen=True)
class CutRow:
    """`inputs`: the processor's output without the tokens that were cut.

    `not_trained`: spans of the rendered text that must not be trained any more. They are the ends of turn of the
    answers that were cut: trained, they would teach the model to stop in the middle of a sentence.
    """

    inputs: dict[str, Any]
    not_trained: list[Span]


def cut_answers(inputs: dict[str, Any], chat: RenderedChat, excess: int) -> CutRow | None:
    """Cut `excess` tokens off the ends of answers, the last answer first.

    Each answer keeps at least one token. Images and all other text stay. Returns None where even then the row
    is too long.
    """
    offsets, image_tokens = inputs[PLACES][0].numpy(), inputs[IMAGE_TOKENS][0].numpy()
    keep, not_trained = np.ones(len(offsets), dtype=bool), []
    for content, span in zip(reversed(chat.contents), reversed(chat.spans), strict=True):
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
