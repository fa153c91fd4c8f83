"""Questions → answers of a model: for predictions, and for validation rows during training."""

from collections.abc import Sequence
from typing import Any

from tuning.data.collator import Collator
from tuning.data.encode import Encoder
from tuning.data.questions import Question, join_on_the_right
from tuning.model.generate import generate_texts


def answer(
    model: Any,
    questions: Sequence[Question],
    encoder: Encoder,
    collator: Collator,
    *,
    max_new_tokens: int,
    together: bool = False,
) -> list[str]:
    """Greedy answers to a batch of questions. `together`: see `generate_texts`."""
    return generate_texts(
        model,
        encoder.processor.tokenizer,
        join_on_the_right([question.sample for question in questions], collator),
        max_new_tokens=max_new_tokens,
        end_of_turn=encoder.chat.end_of_turn,
        together=together,
    )
